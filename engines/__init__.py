"""Engine children. Everything here runs in a process of its own, never in the supervisor.

Engines import `protocol` and `engines.runtime`, never each other and never the supervisor; heavy libraries are
imported only inside an engine's own folder.
"""
