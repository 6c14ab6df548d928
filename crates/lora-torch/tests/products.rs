//! Products of this crate and of libtorch against float64: every form of a weight, every edge of a block.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

use lora_torch::{Int8, LoraPart, Nf4, Products, Projection, Weight, lora_linear, set_num_threads, use_products};
use tch::{Device, Kind, Tensor};

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
    // Fewer rows than a panel is worth, edges of tiles, blocks of rows and of the reduction, rows a page apart, odd widths.
    for (rows, width, out, r) in
        [(3, 20, 7, 2), (16, 64, 16, 1), (17, 300, 33, 4), (97, 1024, 100, 16), (200, 2048, 40, 65), (205, 577, 193, 5)]
    {
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
                    // a product with fewer rows than a panel is worth, as that of a small rank, is libtorch's.
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
