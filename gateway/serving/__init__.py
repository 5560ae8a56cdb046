"""The life of a request between decoding and answering; knows no HTTP."""
