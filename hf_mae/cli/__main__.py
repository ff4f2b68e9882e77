"""`python -m hf_mae.cli` is `hf-mae`."""

from hf_mae.cli import main

if __name__ == "__main__":
    main()
