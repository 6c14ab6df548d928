//! VeRA (Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", 2023): one random pair A, B, frozen and shared by all
//! layers, and two trained vectors in each: `W + diag(b) B diag(d) A` (equation 2).

use crate::Lora;
use crate::error::{Error, Result};
use lora_torch::uniform_from_seed;
use tch::{Device, Kind, Tensor};

/// The shared random pair: as it is saved, and as a model computes with it.
#[derive(Debug)]
pub struct VeraProjection {
    /// `[r, widest input]`, as saved.
    pub a: Tensor,
    /// `[widest output, r]`, as saved.
    pub b: Tensor,
    /// `a` and `b` where and how the model computes; the same memory where that is how they are saved.
    used: (Tensor, Tensor),
}

impl VeraProjection {
    /// Takes a pair as it was saved.
    ///
    /// # Errors
    /// [`Error::Shape`] when the two are not matrices of one rank.
    pub fn from_parts(a: Tensor, b: Tensor) -> Result<Self> {
        let (sa, sb) = (a.size(), b.size());
        if sa.len() != 2 || sb.len() != 2 || sa[0] != sb[1] {
            return Err(Error::Shape {
                what: "vera_A and vera_B",
                expected: "[r, in] and [out, r]".into(),
                got: format!("{sa:?} and {sb:?}"),
            });
        }
        let used = (a.shallow_clone(), b.shallow_clone());
        Ok(Self { a, b, used })
    }

    /// The pair that PEFT draws from `projection_prng_key`: both Kaiming uniform (He et al., 2015, with gain sqrt 2), A first, as
    /// wide as the widest of the adapted layers. The bits are PEFT's.
    ///
    /// # Errors
    /// [`Error::Value`] for a rank below 1, or what libtorch reports.
    pub fn from_key(key: u64, r: i64, widest_in: i64, widest_out: i64) -> Result<Self> {
        if r < 1 {
            return Err(Error::Value { what: "r", value: r.to_string(), expected: "at least 1" });
        }
        // In the order of PEFT's operations: a gain over a root, times another root.
        let bound = |fan_in: i64| 3f64.sqrt() * (2f64.sqrt() / (fan_in as f64).sqrt());
        let mut drawn = uniform_from_seed(key, [([r, widest_in], bound(widest_in)), ([widest_out, r], bound(r))])?;
        let b = drawn.remove(1);
        Self::from_parts(drawn.remove(0), b)
    }

    /// The same for a model that computes in `kind` on `device`.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn used_in(&self, kind: Kind, device: Device) -> Result<Self> {
        let used = |t: &Tensor| -> Result<Tensor> { Ok(t.f_detach()?.f_to_device(device)?.f_to_kind(kind)?) };
        let used = (used(&self.a)?, used(&self.b)?);
        Ok(Self { a: self.a.shallow_clone(), b: self.b.shallow_clone(), used })
    }

    /// Another handle to the same pair.
    pub fn share(&self) -> Self {
        let (a, b) = &self.used;
        Self { a: self.a.shallow_clone(), b: self.b.shallow_clone(), used: (a.shallow_clone(), b.shallow_clone()) }
    }
}

/// The trained vectors of one layer, and its part of the shared pair.
#[derive(Debug)]
pub struct Vera {
    /// `[r]`: scales the ranks.
    pub lambda_d: Tensor,
    /// `[out_features]`: scales the outputs.
    pub lambda_b: Tensor,
    /// The pair that all layers share.
    pub projection: VeraProjection,
    /// `[r, in_features]`: a view.
    pub(crate) a: Tensor,
    /// `[out_features, r]`: a view.
    pub(crate) b: Tensor,
}

impl Vera {
    /// Takes vectors as they stand, for a layer that reads `in_features`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the vectors are none, or the shared pair is smaller than the layer.
    pub fn from_parts(
        lambda_d: Tensor,
        lambda_b: Tensor,
        projection: &VeraProjection,
        in_features: i64,
    ) -> Result<Self> {
        let ([r, widest_in], [widest_out, _]) = (matrix(&projection.a)?, matrix(&projection.b)?);
        let out = lambda_b.size().first().copied().unwrap_or(0);
        let shape = |what, expected: String, got: String| Err(Error::Shape { what, expected, got });
        if lambda_d.size() != [r] || lambda_b.dim() != 1 {
            let got = format!("{:?} and {:?}", lambda_d.size(), lambda_b.size());
            return shape("vera_lambda_d and vera_lambda_b", format!("[{r}] and [out]"), got);
        }
        if widest_in < in_features || widest_out < out {
            let got = format!("[{r}, {widest_in}] and [{widest_out}, {r}]");
            let expected = format!("at least [{r}, {in_features}] and [{out}, {r}]");
            return shape("vera_A and vera_B", expected, got);
        }
        let a = projection.used.0.f_narrow(1, 0, in_features)?;
        let b = projection.used.1.f_narrow(0, 0, out)?;
        Ok(Self { lambda_d, lambda_b, projection: projection.share(), a, b })
    }

    /// A fresh one, which changes nothing: `d` is `d_initial` everywhere and `b` zero (section 3.3). Its vectors are not yet
    /// trained leaves.
    ///
    /// # Errors
    /// As [`Vera::from_parts`].
    pub fn fresh(projection: &VeraProjection, in_features: i64, out_features: i64, d_initial: f64) -> Result<Self> {
        let options = (Kind::Float, projection.used.0.device());
        let d = Tensor::f_full([projection.a.size()[0]], d_initial, options)?;
        Self::from_parts(d, Tensor::f_zeros([out_features], options)?, projection, in_features)
    }

    pub(crate) fn share(&self) -> Self {
        Self {
            lambda_d: self.lambda_d.shallow_clone(),
            lambda_b: self.lambda_b.shallow_clone(),
            projection: self.projection.share(),
            a: self.a.shallow_clone(),
            b: self.b.shallow_clone(),
        }
    }

    pub(crate) fn widths(&self) -> (i64, i64) {
        (self.a.size()[1], self.b.size()[0])
    }

    /// Whether two layers read the same part of A, so that one product serves both.
    pub(crate) fn reads_as(&self, other: &Self) -> bool {
        self.a.data_ptr() == other.a.data_ptr() && self.a.size() == other.a.size()
    }

    /// `x Aᵀ`, `[.., r]`.
    pub(crate) fn down(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_matmul(&self.a.f_to_kind(x.kind())?.f_tr()?)?)
    }

    /// `b ∘ ((d ∘ low) Bᵀ)`, `[.., out_features]`.
    pub(crate) fn up(&self, low: &Tensor) -> Result<Tensor> {
        let kind = low.kind();
        let scaled = low.f_mul(&self.lambda_d.f_to_kind(kind)?)?;
        Ok(scaled.f_matmul(&self.b.f_to_kind(kind)?.f_tr()?)?.f_mul(&self.lambda_b.f_to_kind(kind)?)?)
    }

    pub(crate) fn to_lora(&self) -> Result<Lora> {
        let kind = self.lambda_d.kind();
        let rows = |vector: &Tensor, t: &Tensor| -> Result<Tensor> {
            Ok(t.f_to_kind(kind)?.f_mul(&vector.f_detach()?.f_unsqueeze(1)?)?)
        };
        Lora::from_parts(rows(&self.lambda_d, &self.a)?, rows(&self.lambda_b, &self.b)?, 1.0)
    }
}

fn matrix(t: &Tensor) -> Result<[i64; 2]> {
    t.size().try_into().map_err(|size| Error::Shape {
        what: "vera_A and vera_B",
        expected: "matrices".into(),
        got: format!("{size:?}"),
    })
}
