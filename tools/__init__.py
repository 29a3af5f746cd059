"""What people run beside a node: from a clean clone to a running one, checks, and the three ways to find it lying.

Tools may import every room; no room imports a tool. Each is run as `python -m tools.NAME` in the project's
environment; `python3 tools/bootstrap.py` makes that environment first, and is readable by Pythons that are too old to
run the rest, so that they can say so.

| tool        | what it is for                                                                                       |
|-------------|------------------------------------------------------------------------------------------------------|
| bootstrap   | `demo`, `test` (what CI runs), `up`, `down`, `status`; with `environment` and `nodes`                |
| check       | format, lint, types, tests, in that order; the same here and in CI                                   |
| sim         | clusters from seeds: clocks, disks, threads and network are simulated, and break                     |
| crash       | a real node, killed while clients write, held to what it acknowledged; `--canary` lies on purpose    |
| chaos       | three real nodes under load, killed, paused, cut off from each other, on bad disks and wrong clocks  |
| bench       | speed, recall and size of a node beside the engine alone, on real vectors                            |
| docs        | the README's tables, made from the code                                                              |

Which of them finds what: `sim` finds what depends on the order of things, and replays it from its seed, but its disk is
ours. `crash` meets real files, threads and signals, more slowly, and never the same way twice. The tests of a room find
what is wrong inside it, and say where.

Names here are none of the standard library's: a `tools/inspect.py` would hide `inspect` from whoever runs a file
of this directory as a script.
"""
