"""The language of `filter` and `order_by` (docs/filters.md): its grammar and its fields."""
