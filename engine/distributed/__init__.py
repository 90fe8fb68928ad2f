"""Several processes as one engine (tensor parallelism): their group, and the worker processes that the
first starts.
"""
