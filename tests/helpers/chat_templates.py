"""Chat templates of real families, as their tokenizers have them (shortened where they only write tools), and tiny
tokenizers with the control tokens of each family."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') }}
                {{- '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- endif %}
{%- endfor %}"""

SMOLLM3 = """{%- set today = strftime_now("%d %B %Y") -%}
{{- "<|im_start|>system\\n## Metadata\\n\\nToday Date: " ~ today ~ "\\nReasoning Mode: /no_think\\n\\n" }}
{%- if messages[0].role == "system" %}{{- messages[0].content }}
{%- else %}{{- "You are a helpful AI assistant." }}{%- endif %}
{{- "<|im_end|>\\n" }}
{%- for message in messages -%}
    {%- if message.role == "user" %}
        {{- "<|im_start|>user\\n" + message.content + "<|im_end|>\\n" }}
    {%- elif message.role == "assistant" %}
        {{- "<|im_start|>assistant\\n<think>\\n\\n</think>\\n" + message.content.lstrip("\\n") + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- "<think>\\n\\n</think>\\n" }}{%- endif %}
{%- endif %}"""

LOW_LINE = "\u2581"
FAMILIES: dict[str, tuple[str, str | None, str, tuple[str, ...], tuple[str, ...]]] = {
    "qwen3": (QWEN3, None, "<|im_end|>", ("<|im_start|>",), ("<think>", "</think>")),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>"), ()),
    "gemma": (GEMMA, "<bos>", "<eos>", ("<start_of_turn>",), ("<end_of_turn>",)),
    "mistral": (MISTRAL, "<s>", "</s>", ("[INST]", "[/INST]"), ()),
    "smollm3": (SMOLLM3, None, "<|im_end|>", ("<|im_start|>",), ("<think>", "</think>")),
}
"""Template, BOS, EOS, further special tokens, and control tokens that are plain added ones."""


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """The control tokens and the chat template of a family, over an alphabet of bytes or of characters and words."""
    template, bos, eos, special, plain = FAMILIES[family]
    backend = {"gemma": _gemma, "mistral": _mistral}.get(family, _bytes)()
    backend.add_tokens([AddedToken(name, normalized=False) for name in plain])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, additional_special_tokens=list(special)
    )
    tokenizer.chat_template = template
    return tokenizer


def _bytes() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" ")[0][0]
    backend = _pairs(alphabet, [f"{space}A", "in", f"{space}p"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _gemma() -> Tokenizer:
    """A space is written as a low line."""
    backend = _characters()
    backend.normalizer = normalizers.Replace(" ", LOW_LINE)
    backend.decoder = decoders.Replace(LOW_LINE, " ")
    return backend


def _mistral() -> Tokenizer:
    """As Gemma's, and the first word of all gets a space before it."""
    backend = _characters()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return backend


def _characters() -> Tokenizer:
    alphabet = [*map(chr, range(32, 127)), "\n", LOW_LINE]
    return _pairs(alphabet, [f"{LOW_LINE}A", f"{LOW_LINE}f", f"{LOW_LINE}T", "in"])


def _pairs(alphabet: list[str], merged: list[str]) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate([*alphabet, *merged])}
    return Tokenizer(models.BPE(vocab=vocabulary, merges=[(token[0], token[1]) for token in merged]))
