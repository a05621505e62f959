"""The commands of the library: `python -m linked_jax certify lk_swish --dtype bfloat16`."""

import sys

from linked_jax import certificates


def main(arguments: list[str]) -> int:
    """Run `certify`, the one command; exit code 2 for any other."""
    command, *rest = arguments or ["none"]
    if command == "certify":
        return certificates.main(rest)
    if command in ("-h", "--help"):
        print("The command is certify: python -m linked_jax certify lk_swish; python -m linked_jax certify --help")
        return 0
    print(f"error: the command is certify, got {command}; try python -m linked_jax certify lk_swish", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
