"""First code of every engine child: lock down, then become the engine.

    python -I -S engines/launch.py '{"root": …, "module": …, "python": …}' [LIFELINE_FD]

Only a module is compiled once and for all, a script at every start: so the code is in lockdown/start.py.
Standard library only, run with `-I -S`: nothing third-party can be imported before the process is locked down.

The order is not free. First the cgroup, which holds what is started after it was joined; limits; the user, when root
starts us (lockdown/user.py), since what comes later is made as that user, and since a change of user clears the wish to
die with the parent; then the warden and the namespaces (lockdown/warden.py), because Landlock forbids mounts; then
capabilities and no_new_privs, which Landlock and seccomp ask for; then Landlock; then seccomp, last, because it forbids
the calls used before. After each layer somebody tries what it should refuse (lockdown/canary.py): that is its verdict,
and the engine tells the host in `ready`. A layer that the kernel does not have costs only itself, unless the mode is
"require". macOS has one layer (lockdown/seatbelt.py), Windows none (lockdown/windows.py). Without `sandbox` in the spec
the process only dies with its parent.

The engine's interpreter may be another venv's; it is exec'ed on this installation's `engines` and `protocol`
(`root`), so the two ends of the wire cannot be of different revisions.
"""

import os
import sys

if __name__ == "__main__":
    # Last on the path: only the package `engines`, which nobody else has, is taken from there.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from engines.lockdown.start import ENVIRONMENT as ENVIRONMENT
from engines.lockdown.start import main

if __name__ == "__main__":
    main()
