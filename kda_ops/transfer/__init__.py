"""Moving states and KV blocks between engines: plans as data, and an engine that executes them.

`geometry` describes pages, `plan` which bytes a rank needs from which ranks, `blocks` which pages
of a request match. `engine` is a rank's endpoint of all transfers over a `transport`; `peers` and
`messages` connect it to other engines, `offers` has what it keeps for them and publishes on its
`board`, `reads` has what it reads from them, and the protocol. `nixl` is the transport of serving
stacks and the only module that imports NIXL.
"""
