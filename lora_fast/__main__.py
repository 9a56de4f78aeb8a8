import sys

from lora_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
