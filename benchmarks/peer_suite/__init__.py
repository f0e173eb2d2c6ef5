"""The parts of ``benchmarks/peers.py``: problems, peers behind one interface, statistics and requirements.

Each peer is called through its public interface, on its own copy of the model, with its own way of writing a
batch. What is measured is what a user of that library would pay, its constructor included.
"""
