from .token_drop import stop_ids as stop_ids
from .token_drop import stop_ids_top_k as stop_ids_top_k
from .token_drop import token_drop_columns as token_drop_columns
