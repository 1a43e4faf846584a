"""`python -m stream_em.cli` is the command `stream-em`."""

from stream_em.cli.main import main

if __name__ == "__main__":
    main()
