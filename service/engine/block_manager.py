"""Which KV block belongs to whom: integers only, no tensors.

A block is *used* (referenced by one or more sequences), or *free*. A free block may still hold
the keys and values of a known token prefix; then it is *cached* and the last to be reused.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable

from service.engine.sequence import Sequence


class BlockManager:
    """A pool of equal blocks.

    Args:
        num_blocks: size of the pool.
        block_size: tokens per block.
        enable_prefix_caching: find blocks again by the tokens they were computed from.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._caching = enable_prefix_caching
        # Taken from the front; blocks without content go there, cached ones to the back.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._references = [0] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}
        self._hash_of_block: dict[int, bytes] = {}
        self._num_cached = 0

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out, cached ones included."""
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Free blocks whose content can be found again."""
        return self._num_cached

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def admit(self, seq: Sequence, *, reserve: int) -> bool:
        """Give a sequence without blocks all blocks for its tokens, reusing cached ones.

        Sets `num_computed_tokens` to what the cache supplied.

        Args:
            reserve: free blocks that must remain for sequences that already run.

        Returns:
            False, and nothing changed, if there are not enough blocks.
        """
        assert not seq.block_table, "only a sequence without blocks is admitted"
        prefix = self._cached_prefix(seq)
        num_new = self.blocks_for(seq.num_tokens) - len(prefix)
        num_revived = sum(1 for block in prefix if self._references[block] == 0)
        if num_new + num_revived + reserve > len(self._free):
            return False
        self._num_cached -= num_revived
        for block in prefix:
            self._references[block] += 1
            self._free.pop(block, None)
        seq.block_table.extend(prefix)
        seq.block_table.extend(self._take() for _ in range(num_new))
        seq.num_computed_tokens = len(prefix) * self.block_size
        return True

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make the block table reach `num_tokens`; False, and nothing changed, if it cannot."""
        missing = self.blocks_for(num_tokens) - len(seq.block_table)
        if missing > len(self._free):
            return False
        seq.block_table.extend(self._take() for _ in range(missing))
        return True

    def remember(self, seq: Sequence, num_new_tokens: int) -> None:
        """Make blocks findable that the last `num_new_tokens` computed tokens have filled."""
        if not self._caching:
            return
        first = (seq.num_computed_tokens - num_new_tokens) // self.block_size
        num_full = seq.num_computed_tokens // self.block_size
        self._extend_hashes(seq, num_full)
        for index in range(first, num_full):
            block, digest = seq.block_table[index], seq.block_hashes[index]
            if block not in self._hash_of_block and digest not in self._block_of_hash:
                self._hash_of_block[block] = digest
                self._block_of_hash[digest] = block

    def free(self, seq: Sequence) -> None:
        """Give back all blocks; the tail first, because beginnings are shared most."""
        for block in reversed(seq.block_table):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block in self._hash_of_block:
                    self._num_cached += 1
                else:
                    self._free.move_to_end(block, last=False)
        seq.block_table.clear()

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Compare every count with the block tables of the sequences that hold blocks.

        Raises:
            AssertionError: a block is lost, counted twice, or shared by mistake.
        """
        counted = Counter(block for seq in sequences for block in seq.block_table)
        for block, references in enumerate(self._references):
            assert references == counted[block], f"block {block}: {references} references"
            assert (references == 0) == (block in self._free), f"block {block} free and used"
        cached = sum(1 for block in self._hash_of_block if self._references[block] == 0)
        assert self._num_cached == cached, f"{self._num_cached} cached blocks counted"
        assert all(0 <= block < self.num_blocks for block in counted), "a block outside the pool"
        if not self._caching:
            assert not self._hash_of_block, "blocks are cached although caching is off"
            assert all(count == 1 for count in counted.values()), "a block has two owners"
        assert {digest: block for block, digest in self._hash_of_block.items()} == (
            self._block_of_hash
        ), "the two directions of the prefix cache differ"

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        digest = self._hash_of_block.pop(block, None)
        if digest is not None:
            del self._block_of_hash[digest]
            self._num_cached -= 1
        self._references[block] = 1
        return block

    def _cached_prefix(self, seq: Sequence) -> list[int]:
        """Cached blocks that the sequence begins with; its last token is never among them,
        because that one has to be computed to get logits. Scoring needs the logits of every
        token and reuses none."""
        if not self._caching or seq.params is None:
            return []
        num_full = (seq.num_tokens - 1) // self.block_size
        self._extend_hashes(seq, num_full)
        prefix: list[int] = []
        for digest in seq.block_hashes[:num_full]:
            block = self._block_of_hash.get(digest)
            if block is None:
                break
            prefix.append(block)
        return prefix

    def _extend_hashes(self, seq: Sequence, num_full: int) -> None:
        """Digests chain: equal digests mean equal namespace and equal tokens from the start."""
        for index in range(len(seq.block_hashes), num_full):
            parent = (
                seq.block_hashes[-1]
                if seq.block_hashes
                else hashlib.sha256(seq.cache_namespace).digest()
            )
            start = index * self.block_size
            tokens = array("q", seq.token_ids[start : start + self.block_size])
            seq.block_hashes.append(hashlib.sha256(parent + tokens.tobytes()).digest())
