"""Does it help, when, and by how much: arms, seeds and tasks from one file, a cell a file, and statistics over them.

::

    spec      what a user may set: tasks, arms, seeds, trials
    arms      the ways of training that are compared, as a table
    tasks     data and networks
    train     one network, trained the way of one arm
    outcomes  what a trained network does at each budget
    cells     one cell = one file: names, locks, what is there
    runner    which cells are missing, and who makes them
    ranks     several processes on one network
    figures   cells to paired comparisons
    page      figures to a report
    verify    a few cells made again
    commands  the command line
"""
