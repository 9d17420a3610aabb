"""`python -m training.scorer [minutes=8]`: see storybook/scorer.py."""

from training.storybook.scorer import main

if __name__ == "__main__":
    main()
