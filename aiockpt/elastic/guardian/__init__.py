"""The guardian: a small process between a supervisor and its children, that outlives neither of them for long.

It launches the children, is the subreaper of all that they start, reports their ends, and ends every descendant when it
is told to or when the supervisor is gone. It needs the standard library alone (the interpreter runs it without site
packages), and of that as little as it can, since whoever starts processes waits for it: ``typing`` and ``pathlib``
would be a fifth of its start. It is there in some 20 ms and holds a few MiB.
"""
