"""A hospital's executor with the tests' noise that repeats; started by tests in the place of client.executor."""

from client.executor import main
from fedmm.sites.processes import exits

if __name__ == "__main__":
    exits(lambda: main("tests.fixed_noise:app"))
