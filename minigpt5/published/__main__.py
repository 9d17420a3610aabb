"""`python -m minigpt5.published import|export|sizes`: see checkpoint.py."""

from minigpt5.published.checkpoint import main

if __name__ == "__main__":
    main()
