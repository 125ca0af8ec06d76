"""A hospital's executor whose app a test can hold, kill or make fail; started by tests in the place of client.executor."""

from client.executor import main
from fedmm.sites.processes import exits

if __name__ == "__main__":
    exits(lambda: main("tests.faults.staged:app"))
