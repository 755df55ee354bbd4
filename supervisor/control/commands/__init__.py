"""The verbs of the `supervisor` command that speak with a running supervisor.

Each verb is described in the module that carries it out, and only that module is imported: `supervisor status` must
not wait for what `supervisor doctor` needs. A module has `add_arguments(name, parser)`, which also says with
`set_defaults(command=…)` what is done, and nothing here imports more than the standard library before it is needed.

Exit codes: 0 done; 1 the supervisor refused; 3 no supervisor is running; 64 usage; 77 not for this user; 78 the
configuration that names the socket cannot be read; 130 stopped with Ctrl-C.
"""
