"""The method's experiment as a user would run it: a network, data, a training loop, runs over several seeds.

Recipes use public names of the package only. They train and record; they draw no plots and write no report themselves.
"""
