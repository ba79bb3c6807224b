//! A plain f32 forward pass over dequantised weights: slow, short, and written without any of Cupola's kernels.

use std::ops::Range;

use cupola_kernels::{GateFn, RopePairs};
use cupola_models::spec::{RopeSpec, TensorNames};
use cupola_models::{DecoderSpec, Model};

/// Row-major matrix, `[rows, cols]`.
struct Matrix {
    rows: usize,
    cols: usize,
    values: Vec<f32>,
}

impl Matrix {
    fn load(model: &Model, name: &str) -> Self {
        let part = model.weights.part(name).expect("the model has this tensor");
        let mut values = vec![0.0; part.rows * part.cols];
        part.ty.dequantise(part.data, &mut values);
        Self { rows: part.rows, cols: part.cols, values }
    }

    fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.cols..(i + 1) * self.cols]
    }

    /// `x * self^T` for `x` of shape `[n, cols]`.
    fn apply(&self, x: &[f32]) -> Vec<f32> {
        x.chunks(self.cols).flat_map(|x| (0..self.rows).map(move |i| dot(x, self.row(i)))).collect()
    }
}

/// Sixteen running sums, so that the compiler can vectorise and rounding stays small.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    for (a, b) in a.chunks(16).zip(b.chunks(16)) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}

fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    x.chunks(weight.len())
        .flat_map(|row| {
            let mean = row.iter().map(|v| v * v).sum::<f32>() / row.len() as f32;
            let scale = 1.0 / (mean + eps).sqrt();
            row.iter().zip(weight).map(move |(v, w)| v * scale * w)
        })
        .collect()
}

/// Turns the pairs of one head at `position`.
fn rotate(head: &mut [f32], position: usize, rope: &RopeSpec) {
    let half = head.len() / 2;
    for (i, freq) in rope.inv_freq.iter().enumerate() {
        let (a, b) = match rope.pairs {
            RopePairs::Interleaved => (2 * i, 2 * i + 1),
            RopePairs::Halves => (i, i + half),
        };
        let (sin, cos) = (position as f64 * freq).sin_cos();
        let (x, y) = (f64::from(head[a]), f64::from(head[b]));
        head[a] = (x * cos - y * sin) as f32;
        head[b] = (x * sin + y * cos) as f32;
    }
}

fn gate(f: GateFn, x: f32) -> f32 {
    match f {
        GateFn::Silu => x / (1.0 + (-x).exp()),
        GateFn::GeluTanh => {
            let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
    }
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// Logits after the tokens of `outputs`, each `[vocab]`.
pub(crate) fn logits(model: &Model, tokens: &[u32], outputs: Range<usize>) -> Vec<Vec<f32>> {
    let spec = &model.spec;
    let names = &spec.names;
    let embedding = Matrix::load(model, names.embedding);
    let mut x: Vec<f32> = tokens.iter().flat_map(|&t| embedding.row(t as usize).to_vec()).collect();
    x.iter_mut().for_each(|x| *x *= spec.embedding_scale);
    let norm = |x: &[f32], name: &str| {
        let mut weight = model.weights.vector(name).expect("the model has this norm");
        weight.iter_mut().for_each(|w| *w += spec.norm_offset);
        rms_norm(x, &weight, spec.norm_eps)
    };
    for layer in 0..spec.layers {
        let name = |template: &str| TensorNames::layer(template, layer);
        let apply = |template: &str, x: &[f32]| Matrix::load(model, &name(template)).apply(x);
        let post = |x: Vec<f32>, template: &str| if spec.post_norms { norm(&x, &name(template)) } else { x };

        let h = norm(&x, &name(names.attn_norm));
        let (mut q, mut k, v) = (apply(names.q, &h), apply(names.k, &h), apply(names.v, &h));
        if spec.qk_norm {
            (q, k) = (norm(&q, &name(names.q_norm)), norm(&k, &name(names.k_norm)));
        }
        let attended = apply(names.o, &attention(spec, layer, q, k, &v));
        add(&mut x, &post(attended, names.attn_post_norm));

        let h = norm(&x, &name(names.ffn_norm));
        let gated = apply(names.gate, &h);
        let gated: Vec<f32> = gated.iter().zip(apply(names.up, &h)).map(|(g, up)| gate(spec.gate, *g) * up).collect();
        add(&mut x, &post(apply(names.down, &gated), names.ffn_post_norm));
    }
    let h = norm(&x[outputs.start * spec.hidden..outputs.end * spec.hidden], names.final_norm);
    let head = if model.weights.contains(names.head) { Matrix::load(model, names.head) } else { embedding };
    head.apply(&h).chunks(spec.vocab).map(<[f32]>::to_vec).collect()
}

/// Causal attention with shared key/value heads; `q` is `[n, heads * dim]`, `k` and `v` are `[n, kv_heads * dim]`.
fn attention(spec: &DecoderSpec, layer: usize, mut q: Vec<f32>, mut k: Vec<f32>, v: &[f32]) -> Vec<f32> {
    let shape = spec.heads;
    let (q_cols, kv_cols, dim) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.head_dim);
    let sliding = spec.sliding.as_ref().filter(|sliding| sliding.layers[layer]);
    let (rope, window) = sliding.map_or((&spec.rope, usize::MAX), |sliding| (&sliding.rope, sliding.window));
    for (rows, cols) in [(&mut q, q_cols), (&mut k, kv_cols)] {
        for (position, row) in rows.chunks_mut(cols).enumerate() {
            row.chunks_mut(dim).for_each(|head| rotate(head, position, rope));
        }
    }
    let mut out = vec![0.0; q.len()];
    for t in 0..q.len() / q_cols {
        let seen = (t + 1).saturating_sub(window)..=t;
        for head in 0..shape.heads {
            let kv_head = head / (shape.heads / shape.kv_heads);
            let at = |rows: &'_ [f32], s: usize| rows[s * kv_cols + kv_head * dim..][..dim].to_vec();
            let query = &q[t * q_cols + head * dim..][..dim];
            let mut scores: Vec<f32> = seen.clone().map(|s| dot(query, &at(&k, s)) * spec.query_scale).collect();
            let max = scores.iter().copied().fold(f32::MIN, f32::max);
            scores.iter_mut().for_each(|s| *s = (*s - max).exp());
            let sum: f32 = scores.iter().sum();
            let out = &mut out[t * q_cols + head * dim..][..dim];
            for (s, score) in seen.clone().zip(&scores) {
                let value = at(v, s);
                out.iter_mut().zip(&value).for_each(|(o, v)| *o += score / sum * v);
            }
        }
    }
    out
}
