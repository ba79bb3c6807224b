//! A plain f32 forward pass over dequantised weights: slow, short, and written without any of Cupola's kernels.

use cupola_models::spec::TensorNames;
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

/// Turns the pairs of one head at `position`, as GGUF files of the Llama family store them: `(0, 1), (2, 3), ...`.
fn rotate(head: &mut [f32], position: usize, inv_freq: &[f64]) {
    for (pair, freq) in head.chunks_exact_mut(2).zip(inv_freq) {
        let (sin, cos) = (position as f64 * freq).sin_cos();
        let (a, b) = (f64::from(pair[0]), f64::from(pair[1]));
        pair[0] = (a * cos - b * sin) as f32;
        pair[1] = (a * sin + b * cos) as f32;
    }
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// Logits after every token of `tokens`, each `[vocab]`, for a Llama-family GGUF model.
pub(crate) fn logits(model: &Model, tokens: &[u32]) -> Vec<Vec<f32>> {
    let spec = &model.spec;
    let names = &spec.names;
    let embedding = Matrix::load(model, names.embedding);
    let mut x: Vec<f32> = tokens.iter().flat_map(|&t| embedding.row(t as usize).to_vec()).collect();
    for layer in 0..spec.layers {
        let name = |template: &str| TensorNames::layer(template, layer);
        let norm = |template: &str| model.weights.vector(&name(template)).expect("the model has this norm");
        let apply = |template: &str, x: &[f32]| Matrix::load(model, &name(template)).apply(x);

        let h = rms_norm(&x, &norm(names.attn_norm), spec.norm_eps);
        let (q, k, v) = (apply(names.q, &h), apply(names.k, &h), apply(names.v, &h));
        add(&mut x, &apply(names.o, &attention(spec, q, k, &v)));

        let h = rms_norm(&x, &norm(names.ffn_norm), spec.norm_eps);
        let gated: Vec<f32> =
            apply(names.gate, &h).iter().zip(apply(names.up, &h)).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        add(&mut x, &apply(names.down, &gated));
    }
    let final_norm = model.weights.vector(names.final_norm).expect("the model has a final norm");
    let h = rms_norm(&x, &final_norm, spec.norm_eps);
    let head = if model.weights.contains(names.head) { Matrix::load(model, names.head) } else { embedding };
    head.apply(&h).chunks(spec.vocab).map(<[f32]>::to_vec).collect()
}

/// Causal attention with shared key/value heads; `q` is `[n, heads * dim]`, `k` and `v` are `[n, kv_heads * dim]`.
fn attention(spec: &DecoderSpec, mut q: Vec<f32>, mut k: Vec<f32>, v: &[f32]) -> Vec<f32> {
    let shape = spec.heads;
    let (q_cols, kv_cols, dim) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.head_dim);
    for (rows, cols) in [(&mut q, q_cols), (&mut k, kv_cols)] {
        for (position, row) in rows.chunks_mut(cols).enumerate() {
            row.chunks_mut(dim).for_each(|head| rotate(head, position, &spec.rope.inv_freq));
        }
    }
    let mut out = vec![0.0; q.len()];
    for t in 0..q.len() / q_cols {
        for head in 0..shape.heads {
            let kv_head = head / (shape.heads / shape.kv_heads);
            let at = |rows: &'_ [f32], s: usize| rows[s * kv_cols + kv_head * dim..][..dim].to_vec();
            let query = &q[t * q_cols + head * dim..][..dim];
            let mut scores: Vec<f32> = (0..=t).map(|s| dot(query, &at(&k, s)) * spec.query_scale).collect();
            let max = scores.iter().copied().fold(f32::MIN, f32::max);
            scores.iter_mut().for_each(|s| *s = (*s - max).exp());
            let sum: f32 = scores.iter().sum();
            let out = &mut out[t * q_cols + head * dim..][..dim];
            for (s, score) in scores.iter().enumerate() {
                let value = at(v, s);
                out.iter_mut().zip(&value).for_each(|(o, v)| *o += score / sum * v);
            }
        }
    }
    out
}
