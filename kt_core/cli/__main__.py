"""``python -m kt_core.cli``."""

from kt_core.cli.main import main

if __name__ == "__main__":
    main()
