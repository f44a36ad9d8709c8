"""Run the command line as `python -m dreamfleet.cluster.cli`, which is what a job runs."""

from dreamfleet.cluster.cli.program import main

if __name__ == "__main__":
    main()
