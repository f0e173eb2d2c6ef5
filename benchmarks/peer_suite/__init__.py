"""The parts of ``benchmarks/peers.py``: problems, peers behind one interface, statistics and requirements; and of
``benchmarks/monitor_peers.py``: trainings in pairs (``paired``) and what watches them (``watchers``).

Each peer is called through its public interface, on its own copy of the model, with its own way of writing a
batch. What is measured is what a user of that library would pay, its constructor included.
"""
