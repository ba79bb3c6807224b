&[
    ("attention_decode", include_bytes!("attention_decode.fatbin")),
    ("attention_prefill", include_bytes!("attention_prefill.fatbin")),
    ("elementwise", include_bytes!("elementwise.fatbin")),
    ("gemm_large", include_bytes!("gemm_large.fatbin")),
    ("gemm_small", include_bytes!("gemm_small.fatbin")),
    ("gemm_tile", include_bytes!("gemm_tile.fatbin")),
    ("rope", include_bytes!("rope.fatbin")),
    ("sampling", include_bytes!("sampling.fatbin")),
    ("tokens", include_bytes!("tokens.fatbin")),
]
