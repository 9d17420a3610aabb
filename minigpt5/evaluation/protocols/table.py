"""The protocols by name."""

from __future__ import annotations

from minigpt5.evaluation.protocols.cc3m import CC3M
from minigpt5.evaluation.protocols.dialogue import MMDIALOG
from minigpt5.evaluation.protocols.interleave import INTERLEAVE
from minigpt5.evaluation.protocols.story import STORY
from minigpt5.evaluation.protocols.structure import STRUCTURE
from minigpt5.evaluation.protocols.vist import VIST

PROTOCOLS = {one.name: one for one in (CC3M, VIST, MMDIALOG, STORY, STRUCTURE, INTERLEAVE)}
