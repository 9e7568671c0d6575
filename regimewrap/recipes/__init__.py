"""The method's experiment as a user would run it: a network, data, a training loop, runs over several seeds.

Recipes train, record, and show how far they are. They draw no plots and write no reports; ``report`` does.
"""
