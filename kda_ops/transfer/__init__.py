"""Moving states and KV blocks between engines: plans as data, and an engine that executes them.

`geometry` says what pages look like, `plan` which bytes a rank needs of which ranks, `blocks` which
pages of a request match. `engine` is a rank's end of all transfers over a `transport`; `peers` and
`messages` are how it meets other engines, `offers` what it keeps for them and shows on its `board`,
`reads` what it reads of theirs and the protocol of it. `nixl` is the transport of serving stacks
and the only module that imports NIXL.
"""
