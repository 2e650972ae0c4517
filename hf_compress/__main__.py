"""`python -m hf_compress` is `hf-compress`."""

from .cli import main

if __name__ == "__main__":
    main()
