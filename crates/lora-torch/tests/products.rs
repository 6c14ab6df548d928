//! Products and attention of this crate and of libtorch against float64: every form of a weight, every edge of a block.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use lora_torch::{
    AttentionRule, Int8, LoraPart, Nf4, Products, Projection, Segments, Weight, attention, lora_linear,
    set_num_threads, use_products,
};
use std::sync::Mutex;
use tch::{Device, Kind, Tensor};

/// Who computes, and by how many threads, is one choice for the process.
static CHOICE: Mutex<()> = Mutex::new(());

/// A sum of k products in fp32 is off by at most k half-ulps of the sum of their absolute values; what is compared is relative
/// to the largest result, of which that sum is at most some ten times here.
fn tolerance(k: i64) -> f64 {
    10.0 * k as f64 * f64::from(f32::EPSILON) / 2.0
}

/// Scattered values of variance one, the same at every call.
fn values(shape: &[i64], salt: f64) -> Tensor {
    let n: i64 = shape.iter().product();
    let at = Tensor::arange(n, (Kind::Double, Device::Cpu)) * 12.9898 + salt * 78.233;
    ((at.sin() * 43758.5453).frac() * 2.0 - at.cos()).view(shape).to_kind(Kind::Float)
}

fn forms(rows: i64, cols: i64) -> Vec<(&'static str, Weight)> {
    let w = values(&[rows, cols], 1.0);
    vec![
        ("float32", Weight::Plain(w.shallow_clone())),
        ("the other way round", Weight::Plain(w.tr().contiguous().tr())),
        ("a part of a larger one", Weight::Plain(values(&[rows, cols + 5], 2.0).narrow(1, 3, cols))),
        ("bfloat16", Weight::Plain(w.to_kind(Kind::BFloat16))),
        ("float16", Weight::Plain(w.to_kind(Kind::Half))),
        ("int8", Weight::Int8(Int8::pack(&w).unwrap())),
        ("int8 of the other way round", Weight::Int8(Int8::pack(&w.tr().contiguous().tr()).unwrap())),
        ("nf4", Weight::Nf4(Nf4::pack(&w, false).unwrap())),
        ("nf4-double", Weight::Nf4(Nf4::pack(&w, true).unwrap())),
    ]
}

fn far(got: &Tensor, wanted: &Tensor) -> f64 {
    assert_eq!(got.size(), wanted.size());
    let difference = (got.to_kind(Kind::Double) - wanted).abs().max().double_value(&[]);
    difference / wanted.abs().max().double_value(&[])
}

/// Result and gradients of input, A and B, for a gradient of the result that is not constant.
fn computed(x: &Tensor, weight: &Weight, bias: &Tensor, a: &Tensor, b: &Tensor) -> [Tensor; 4] {
    let leaf = |t: &Tensor| t.detach().copy().set_requires_grad(true);
    let (x, a, b) = (leaf(x), leaf(a), leaf(b));
    let adapter = Some(LoraPart { a: &a, b: &b, scale: 0.5 });
    let y = lora_linear(&x, &[Projection { weight, bias: Some(bias), adapter }], 0.0).unwrap().remove(0);
    (&y * values(&y.size(), 9.0)).sum(Kind::Float).backward();
    [y.detach(), x.grad(), a.grad(), b.grad()]
}

#[test]
fn products_are_those_in_float64_whoever_computes_them() {
    let _choice = CHOICE.lock();
    // Fewer rows than a panel is worth, edges of tiles, blocks of rows and of the reduction, rows a page apart, odd widths, right
    // operands that are read where they lie.
    for (rows, width, out, r) in [
        (3, 20, 7, 2),
        (16, 64, 16, 1),
        (17, 300, 33, 4),
        (40, 96, 176, 8),
        (97, 1024, 100, 16),
        (200, 2048, 40, 65),
        (205, 577, 193, 5),
        (700, 48, 208, 48),
    ] {
        let (x, bias) = (values(&[rows, width], 3.0), values(&[out], 4.0));
        let (a, b) = (values(&[r, width], 5.0), values(&[out, r], 6.0));
        for (form, weight) in forms(out, width) {
            let wide = |t: &Tensor| t.to_kind(Kind::Double);
            let (x64, a64, b64, w64) = (wide(&x), wide(&a), wide(&b), wide(&weight.dense().unwrap()));
            let g = wide(&values(&[rows, out], 9.0));
            let gu = g.matmul(&b64) * 0.5;
            let u = x64.matmul(&a64.tr());
            let wanted = [
                x64.matmul(&w64.tr()) + u.matmul(&b64.tr()) * 0.5 + wide(&bias),
                g.matmul(&w64) + gu.matmul(&a64),
                gu.tr().matmul(&x64),
                g.tr().matmul(&u) * 0.5,
            ];
            let mut before: Option<[Tensor; 4]> = None;
            for products in [Products::Libtorch, Products::Avx2, Products::Avx512] {
                use_products(products).unwrap();
                let used = Products::current().unwrap();
                assert_eq!(used, products.min(Products::widest().unwrap()));
                for threads in [1, 2, 3] {
                    set_num_threads(threads);
                    let got = computed(&x, &weight, &bias, &a, &b);
                    for (part, (got, wanted)) in ["y", "x", "A", "B"].iter().zip(got.iter().zip(&wanted)) {
                        let (d, most) = (far(got, wanted), tolerance(width.max(out).max(rows) + r));
                        assert!(
                            d < most,
                            "{form} {rows} x {width} x {out}, r {r}, {part}, {used:?}: {d:e} of {most:e}"
                        );
                    }
                    // The bits depend neither on the number of threads nor on the CPU. The result and the gradient of the input are compared:
                    // a product with few rows, as that of a small rank, is libtorch's.
                    if used != Products::Libtorch && rows >= 16 {
                        if let Some(before) = &before {
                            let same = (0..2).all(|part| before[part].equal(&got[part]));
                            assert!(same, "{form} {rows} x {width} x {out}, {used:?}, {threads} threads");
                        }
                        before = Some(got);
                    }
                }
            }
        }
    }
}

/// Softmax of the scaled scores within each segment, times the values, in float64 by libtorch's own autograd.
fn attention_in_float64(qkv: &[Tensor; 3], lens: &[i64], scale: f64, window: Option<i64>, causal: bool) -> Tensor {
    let [q, k, v] = qkv;
    let groups = q.size()[1] / k.size()[1];
    let (mut start, mut outs) = (0, Vec::new());
    for &len in lens {
        let part =
            |t: &Tensor, times: i64| t.narrow(0, start, len).repeat_interleave_self_int(times, 1, None).transpose(0, 1);
        let scores = part(q, 1).matmul(&part(k, groups).transpose(1, 2)) * scale;
        let mut hidden = Tensor::zeros([len, len], (Kind::Bool, Device::Cpu));
        let all = Tensor::ones([len, len], (Kind::Bool, Device::Cpu));
        if causal {
            hidden = hidden.logical_or(&all.triu(1));
        }
        if let Some(window) = window {
            hidden = hidden.logical_or(&all.tril(-window));
        }
        let weights = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, None);
        outs.push(weights.matmul(&part(v, groups)).transpose(0, 1));
        start += len;
    }
    Tensor::cat(&outs, 0)
}

/// Lengths of the segments, heads of keys, queries to each, width of a head, window, whether causal.
type AttentionCase<'a> = (&'a [i64], i64, i64, i64, Option<i64>, bool);

#[test]
fn attention_is_that_in_float64_whoever_computes_it() {
    let _choice = CHOICE.lock();
    // Edges of blocks and tiles, groups of queries and slices of them, heads of odd widths, windows within and across blocks, both directions.
    let cases: [AttentionCase; 9] = [
        (&[1, 2], 1, 1, 8, None, true),
        (&[47, 48, 49, 1, 97], 2, 3, 16, None, true),
        (&[200, 3], 1, 2, 64, None, true),
        (&[130], 2, 1, 20, Some(2), true),
        (&[130, 60], 1, 2, 33, Some(37), true),
        (&[300], 1, 1, 40, Some(64), true),
        (&[65, 31], 3, 1, 32, None, false),
        (&[5, 5, 5], 2, 2, 7, None, false),
        (&[450, 40, 260], 3, 3, 16, None, true),
    ];
    for (lens, kv, groups, d, window, causal) in cases {
        let (tokens, scale) = (lens.iter().sum::<i64>(), 1.0 / (d as f64).sqrt());
        let of = |heads: i64, salt: f64| values(&[tokens, heads, d], salt);
        let given = [of(kv * groups, 1.0), of(kv, 2.0), of(kv, 3.0)];
        let g = of(kv * groups, 4.0);
        let wide = given.each_ref().map(|t| t.to_kind(Kind::Double).set_requires_grad(true));
        let wanted = attention_in_float64(&wide, lens, scale, window, causal);
        (&wanted * &g.to_kind(Kind::Double)).sum(Kind::Double).backward();
        let wanted = [wanted.detach(), wide[0].grad(), wide[1].grad(), wide[2].grad()];
        for products in [Products::Libtorch, Products::Avx2, Products::Avx512] {
            use_products(products).unwrap();
            let mut before: Option<[Tensor; 4]> = None;
            for threads in [1, 2, 3] {
                set_num_threads(threads);
                let [q, k, v] = given.each_ref().map(|t| t.copy().set_requires_grad(true));
                let segments = Segments::new(lens).unwrap();
                let rule = AttentionRule { scale, window, softcap: None, causal };
                let out = attention(&q, &k, &v, &segments, rule).unwrap();
                (&out * &g).sum(Kind::Float).backward();
                let got = [out.detach(), q.grad(), k.grad(), v.grad()];
                for (part, (got, wanted)) in ["out", "q", "k", "v"].iter().zip(got.iter().zip(&wanted)) {
                    // A chain of two products and a softmax.
                    let (off, most) = (far(got, wanted), 3.0 * tolerance(lens.iter().max().unwrap() * groups + d));
                    assert!(
                        off < most,
                        "{lens:?} {kv} x {groups} x {d}, {window:?}, {part}, {products:?}: {off:e} of {most:e}"
                    );
                }
                if Products::current().unwrap() != Products::Libtorch {
                    if let Some(before) = &before {
                        assert!(
                            before.iter().zip(&got).all(|(a, b)| a.equal(b)),
                            "{lens:?}, {products:?}, {threads} threads"
                        );
                    }
                    before = Some(got);
                }
            }
        }
    }
}
