"""The parity matrix: tiny models of every family."""

from tests.parity import falcon_rows, gpt_rows, llama_rows, rotary_rows
from tests.parity.row import Row

ROWS: tuple[Row, ...] = (
    *llama_rows.ROWS,
    *rotary_rows.ROWS,
    *gpt_rows.ROWS,
    *falcon_rows.ROWS,
)
