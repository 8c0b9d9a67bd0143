"""Where KV bytes live, and who may move them. This package knows nothing of models or protocols.

The words of this package, one line each:

block       `block_tokens` consecutive tokens' KV for every layer: the unit of copying, storing and forgetting
tail        a block with fewer tokens than that: the end of a session, stored like any other block
key         the content identity of a block: a hash over its parent's key and its own token ids
root        the parent of a chain's first block: fingerprint of the model and its KV format, and the tenant's salt
tier        DEVICE, HOST, DISK: where a copy of a block's bytes may be
worth       a policy's rank of a block; the victim of a tier is what is worth least of what may leave it
pin         a lease's protection by an operator: on the device or the host until it expires
place       one tier's slot id that holds (or will hold) a block's bytes
hold        what one running sequence has: references on matched blocks, private slots that it writes
lend        give a sequence private device slots to write; commit: give such a slot its key, and so share it
hole        a matched block whose bytes did not come: the hold's own sequence computes it
adopt       learn of a record that was on disk before the start
ledger      why blocks that were known are known no more
lease       a finished sequence's blocks, kept warm for the session until time or pressure moves them
action      a copy the tables ask the edge to make; issued is not landed: both are events
manifest    the durable record of one response: the exact token ids, the items, the block keys
"""
