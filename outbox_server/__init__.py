"""The import package of Outbox's servers and command line.

The folders stand at the top of the repository; this package links to them, so that the tree and the
installed wheel have the same import names, and no wheel installs a package called `shared`.
"""
