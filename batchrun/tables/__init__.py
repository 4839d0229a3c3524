"""JSON as typed Arrow columns: JSONL rows (`jsonl`), answers of a schema (`schema`). PURE"""
