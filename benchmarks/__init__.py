"""Times, memory and errors beside other people's libraries, and the distance to the floor: `python -m benchmarks`."""
