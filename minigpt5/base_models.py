"""`python -m minigpt5.base_models`: convert all base models ahead of time, see model/base_models.py."""

import sys

from minigpt5.model.base_models import main

if __name__ == "__main__":
    sys.exit(main())
