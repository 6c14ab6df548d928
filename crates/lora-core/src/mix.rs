//! Several adapters of one module made into one, whose scale is 1: the combinations of PEFT's `add_weighted_adapter`, and
//! how far each is from the exact weighted sum.
//!
//! Ties-merging is Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023; DARE is Yu et al.,
//! "Language Models are Super Mario", 2023.

use crate::error::{Error, Result};
use lora_torch::{manual_seed, mix_seed};
use tch::{Device, Kind, Tensor, no_grad};

/// How adapters are put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combination {
    /// All A below and all B beside each other: the exact sum, of the sum of the ranks.
    Cat,
    /// The exact sum, cut to its first singular triplets.
    Svd,
    /// A and B are summed by themselves, weighted by `sqrt(|w s|)` each: cheap, and far from the sum of the products.
    Linear,
    /// As `Linear`, of what is left of A and B after the smallest entries are set to zero.
    MagnitudePrune,
    /// As `MagnitudePrune`, where an entry counts only if it has the sign that prevails, and the mean is taken.
    Ties,
    /// As `Linear`, of what is left after entries are dropped at random and the others scaled up.
    DareLinear,
    /// As `Ties`, dropping at random.
    DareTies,
    /// The rules of `MagnitudePrune` on the products, cut by SVD.
    MagnitudePruneSvd,
    /// The rules of `Ties` on the products, cut by SVD.
    TiesSvd,
    /// The rules of `DareLinear` on the products, cut by SVD.
    DareLinearSvd,
    /// The rules of `DareTies` on the products, cut by SVD.
    DareTiesSvd,
}

impl Combination {
    /// Every one, with its name in PEFT.
    pub const ALL: [(&'static str, Self); 11] = [
        ("cat", Self::Cat),
        ("svd", Self::Svd),
        ("linear", Self::Linear),
        ("magnitude_prune", Self::MagnitudePrune),
        ("ties", Self::Ties),
        ("dare_linear", Self::DareLinear),
        ("dare_ties", Self::DareTies),
        ("magnitude_prune_svd", Self::MagnitudePruneSvd),
        ("ties_svd", Self::TiesSvd),
        ("dare_linear_svd", Self::DareLinearSvd),
        ("dare_ties_svd", Self::DareTiesSvd),
    ];

    /// Whether all adapters must have one rank, which is also that of the result.
    pub fn needs_one_rank(self) -> bool {
        matches!(self, Self::Linear | Self::MagnitudePrune | Self::Ties | Self::DareLinear | Self::DareTies)
    }

    /// Whether the rank of the result can be chosen.
    pub fn cuts(self) -> bool {
        !self.needs_one_rank() && self != Self::Cat
    }

    /// What is done to the tensors before they are summed, and how they are summed.
    fn rules(self) -> (Pruning, bool) {
        match self {
            Self::Cat | Self::Svd | Self::Linear => (Pruning::None, false),
            Self::MagnitudePrune | Self::MagnitudePruneSvd => (Pruning::Magnitude, false),
            Self::Ties | Self::TiesSvd => (Pruning::Magnitude, true),
            Self::DareLinear | Self::DareLinearSvd => (Pruning::Random, false),
            Self::DareTies | Self::DareTiesSvd => (Pruning::Random, true),
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Pruning {
    None,
    Magnitude,
    Random,
}

/// Which sign prevails where adapters disagree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MajoritySign {
    /// That of the sum.
    #[default]
    Total,
    /// That of the greater number.
    Frequency,
}

/// Settings of a mix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MixOptions {
    /// How adapters are put together.
    pub combination: Combination,
    /// Rank of the result, where it can be chosen; absent, the largest of the adapters.
    pub rank: Option<i64>,
    /// Share of the entries that pruning keeps, in (0, 1].
    pub density: f64,
    /// For `Ties` and `DareTies`.
    pub majority: MajoritySign,
    /// Where `Dare` draws from.
    pub seed: u64,
}

/// One adapter of a module in a mix.
#[derive(Clone, Copy, Debug)]
pub struct MixPart<'a> {
    /// `[r, in]`
    pub a: &'a Tensor,
    /// `[out, r]`
    pub b: &'a Tensor,
    /// `lora_alpha / r`, or `lora_alpha / sqrt(r)` under rsLoRA: the adapter's own, whatever its convention.
    pub scale: f64,
    /// What the user multiplies it by; may be negative.
    pub weight: f64,
}

impl MixPart<'_> {
    fn factor(&self) -> f64 {
        self.scale * self.weight
    }

    fn rank(&self) -> i64 {
        self.a.size()[0]
    }
}

/// A and B of the mixed adapter of one module, fp32, with scale 1. `salt` tells modules apart for `Dare`.
///
/// # Errors
/// [`Error::Shape`] for adapters of different widths, or of different ranks where they must be alike; [`Error::Value`]
/// for a density outside its range.
pub fn mix(parts: &[MixPart<'_>], options: &MixOptions, salt: u64) -> Result<(Tensor, Tensor)> {
    let (pruning, elects) = options.combination.rules();
    check(parts, options, pruning)?;
    let seed = |i: usize, which: u64| mix_seed(&[options.seed, salt, i as u64, which]);
    no_grad(|| match options.combination {
        Combination::Cat => {
            let a: Vec<Tensor> =
                parts.iter().map(|p| p.a.f_mul_scalar(p.factor())).collect::<std::result::Result<_, _>>()?;
            let b: Vec<&Tensor> = parts.iter().map(|p| p.b).collect();
            Ok((Tensor::f_cat(&a, 0)?, Tensor::f_cat(&b, 1)?))
        }
        Combination::Svd => cut(&Factors::of(parts)?, rank_of(parts, options)),
        combination if combination.needs_one_rank() => {
            // The sign goes to one side only, or two of them would cancel.
            let root = |p: &MixPart<'_>| p.factor().abs().sqrt();
            let signed = |p: &MixPart<'_>| root(p) * if p.factor() >= 0.0 { 1.0 } else { -1.0 };
            let side = |which: u64, tensor: &dyn Fn(&MixPart<'_>) -> Tensor, weight: &dyn Fn(&MixPart<'_>) -> f64| {
                let tensors =
                    parts.iter().enumerate().map(|(i, p)| prune(&tensor(p), pruning, options, seed(i, which)));
                let tensors = tensors.collect::<Result<Vec<_>>>()?;
                let weights: Vec<f64> = parts.iter().map(weight).collect();
                sum(&tensors, &weights, elects, options.majority)
            };
            Ok((side(0, &|p| p.a.shallow_clone(), &signed)?, side(1, &|p| p.b.shallow_clone(), &root)?))
        }
        _ => {
            let products = parts.iter().enumerate().map(|(i, p)| {
                let delta = p.b.f_matmul(p.a)?.f_mul_scalar(p.scale)?;
                prune(&delta, pruning, options, seed(i, 0))
            });
            let products = products.collect::<Result<Vec<_>>>()?;
            let weights: Vec<f64> = parts.iter().map(|p| p.weight).collect();
            let dense = sum(&products, &weights, elects, options.majority)?;
            cut_dense(&dense, rank_of(parts, options))
        }
    })
}

fn check(parts: &[MixPart<'_>], options: &MixOptions, pruning: Pruning) -> Result<()> {
    let Some(first) = parts.first() else {
        return Err(Error::Value { what: "adapters", value: "0".into(), expected: "at least one" });
    };
    let widths = |p: &MixPart<'_>| (p.a.size()[1], p.b.size()[0]);
    for p in parts {
        let ranks_differ = options.combination.needs_one_rank() && p.rank() != first.rank();
        if widths(p) != widths(first) || ranks_differ {
            let shown = |p: &MixPart<'_>| format!("{:?} and {:?}", p.a.size(), p.b.size());
            return Err(Error::Shape { what: "the adapters' A and B", expected: shown(first), got: shown(p) });
        }
    }
    let keeps = pruning == Pruning::None || (options.density > 0.0 && options.density <= 1.0);
    if !keeps {
        return Err(Error::Value {
            what: "density",
            value: options.density.to_string(),
            expected: "above 0 and at most 1",
        });
    }
    if let Some(rank) = options.rank.filter(|r| *r < 1) {
        return Err(Error::Value { what: "rank", value: rank.to_string(), expected: "at least 1" });
    }
    Ok(())
}

fn rank_of(parts: &[MixPart<'_>], options: &MixOptions) -> i64 {
    options.rank.unwrap_or_else(|| parts.iter().map(MixPart::rank).max().unwrap_or(1))
}

fn prune(t: &Tensor, pruning: Pruning, options: &MixOptions, seed: u64) -> Result<Tensor> {
    if pruning == Pruning::None || options.density >= 1.0 {
        return Ok(t.shallow_clone());
    }
    if pruning == Pruning::Random {
        let _drawing = manual_seed(seed);
        let kept = Tensor::f_rand(t.size(), (Kind::Float, Device::Cpu))?.f_lt(options.density)?;
        return Ok(t.f_mul(&kept)?.f_div_scalar(options.density)?);
    }
    let flat = t.f_reshape([-1])?;
    let keep = (options.density * flat.numel() as f64) as i64;
    let (_, places) = flat.f_abs()?.f_topk(keep, 0, true, false)?;
    let mask = flat.f_zeros_like()?.f_index_fill(0, &places, 1.0)?;
    Ok(flat.f_mul(&mask)?.f_reshape(t.size())?)
}

/// The weighted sum; where signs are elected, of the entries that have the sign that prevails, over their number.
fn sum(tensors: &[Tensor], weights: &[f64], elects: bool, majority: MajoritySign) -> Result<Tensor> {
    let stack = Tensor::f_stack(tensors, 0)?;
    let mut shape = vec![1; stack.dim()];
    shape[0] = weights.len() as i64;
    let weights = Tensor::f_from_slice(weights)?.f_to_kind(stack.kind())?.f_view(shape.as_slice())?;
    let weighted = stack.f_mul(&weights)?;
    let over = |t: &Tensor| t.f_sum_dim_intlist([0i64].as_slice(), false, stack.kind());
    if !elects {
        return Ok(over(&weighted)?);
    }
    let votes = match majority {
        MajoritySign::Total => over(&stack)?,
        MajoritySign::Frequency => over(&stack.f_sign()?)?,
    };
    // Zero counts as positive.
    let sign = votes.f_ge(0.0)?.f_to_kind(stack.kind())?.f_mul_scalar(2.0)?.f_sub_scalar(1.0)?;
    let agrees = stack.f_sign()?.f_eq_tensor(&sign)?;
    Ok(over(&weighted.f_mul(&agrees)?)?.f_div(&over(&agrees.f_to_kind(stack.kind())?)?.f_clamp_min(1.0)?)?)
}

/// A sum of products `Σ left right`, kept as its factors, fp64.
struct Factors {
    /// `[out, Σ r]`
    left: Tensor,
    /// `[Σ r, in]`
    right: Tensor,
}

impl Factors {
    fn of(parts: &[MixPart<'_>]) -> Result<Self> {
        let wide = |t: &Tensor| t.f_detach()?.f_to_kind(Kind::Double);
        let left = parts.iter().map(|p| wide(p.b)?.f_mul_scalar(p.factor()));
        let right = parts.iter().map(|p| wide(p.a));
        let left: Vec<Tensor> = left.collect::<std::result::Result<_, tch::TchError>>()?;
        let right: Vec<Tensor> = right.collect::<std::result::Result<_, tch::TchError>>()?;
        Ok(Self { left: Tensor::f_cat(&left, 1)?, right: Tensor::f_cat(&right, 0)? })
    }

    /// `Q_left`, `R_left R_rightᵀ` (small), `Q_rightᵀ`: their product is the sum.
    fn core(&self) -> Result<(Tensor, Tensor, Tensor)> {
        let (q_left, r_left) = Tensor::f_linalg_qr(&self.left, "reduced")?;
        let (q_right, r_right) = Tensor::f_linalg_qr(&self.right.f_tr()?, "reduced")?;
        Ok((q_left, r_left.f_matmul(&r_right.f_tr()?)?, q_right.f_tr()?))
    }

    fn norm(&self) -> Result<f64> {
        Ok(self.core()?.1.f_norm()?.f_double_value(&[])?)
    }
}

/// The first singular triplets of a sum of products, without making that sum: exact, at the cost of the ranks.
fn cut(factors: &Factors, rank: i64) -> Result<(Tensor, Tensor)> {
    let (q_left, core, q_right) = factors.core()?;
    let (a, b) = cut_dense(&core, rank)?;
    let float = |t: Tensor| t.f_to_kind(Kind::Float);
    let wide = |t: &Tensor| t.f_to_kind(Kind::Double);
    Ok((float(wide(&a)?.f_matmul(&q_right)?)?, float(q_left.f_matmul(&wide(&b)?)?)?))
}

/// `A = Vᵀ`, `B = U S` of the first singular triplets; zeros where the rank asked for is larger than there are any.
///
/// # Shapes
/// `dense` `[out, in]`; A is `[rank, in]` and B `[out, rank]`, fp32.
///
/// # Errors
/// What libtorch reports, as for a matrix that is not finite.
pub fn cut_dense(dense: &Tensor, rank: i64) -> Result<(Tensor, Tensor)> {
    let (u, s, v) = dense.f_svd(true, true)?;
    let have = rank.min(s.size()[0]);
    let b = u.f_narrow(1, 0, have)?.f_mul(&s.f_narrow(0, 0, have)?.f_unsqueeze(0)?)?;
    let a = v.f_narrow(1, 0, have)?.f_tr()?;
    let keep = if dense.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let (a, b) = (a.f_to_kind(keep)?.f_contiguous()?, b.f_to_kind(keep)?.f_contiguous()?);
    padded(&a, &b, rank)
}

/// The pair with zeros up to a rank: the same product.
///
/// # Errors
/// What libtorch reports.
pub fn padded(a: &Tensor, b: &Tensor, rank: i64) -> Result<(Tensor, Tensor)> {
    let lacking = rank - a.size()[0];
    if lacking <= 0 {
        return Ok((a.shallow_clone(), b.shallow_clone()));
    }
    let zeros = |rows, columns| Tensor::f_zeros([rows, columns], (a.kind(), a.device()));
    Ok((Tensor::f_cat(&[a, &zeros(lacking, a.size()[1])?], 0)?, Tensor::f_cat(&[b, &zeros(b.size()[0], lacking)?], 1)?))
}

/// `‖B A - Σ w s B_i A_i‖ / ‖Σ w s B_i A_i‖` (Frobenius; 0 for two zeros), and that divisor, in fp64 from the factors.
///
/// # Errors
/// What libtorch reports.
pub fn error_of_mix(a: &Tensor, b: &Tensor, parts: &[MixPart<'_>]) -> Result<(f64, f64)> {
    no_grad(|| {
        let exact = Factors::of(parts)?;
        let wide = |t: &Tensor| t.f_to_kind(Kind::Double);
        let difference = Factors {
            left: Tensor::f_cat(&[&exact.left, &wide(b)?.f_neg()?], 1)?,
            right: Tensor::f_cat(&[&exact.right, &wide(a)?], 0)?,
        };
        let (error, size) = (difference.norm()?, exact.norm()?);
        Ok((if error == 0.0 { 0.0 } else { error / size }, size))
    })
}
