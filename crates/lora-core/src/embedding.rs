//! A frozen embedding with an adapter beside it.

use crate::Lora;
use crate::dora::magnitude_ratio;
use crate::error::{Error, Result};
use tch::{Kind, Tensor};

/// Row `i` of the result is `W[i] + scale · (B A)ᵀ[i]`; with a magnitude (DoRA), each column of that is `m / n` times it.
#[derive(Debug)]
pub struct EmbeddingLayer {
    /// `[vocab, hidden]`
    pub weight: Tensor,
    /// The dtype of what it gives, whatever that of the table.
    pub kind: Kind,
    /// The adapter, if this embedding has one: `a` `[r, vocab]`, `b` `[hidden, r]`.
    pub lora: Option<Lora>,
}

impl EmbeddingLayer {
    /// An embedding without an adapter.
    pub fn frozen(weight: Tensor) -> Self {
        Self { kind: weight.kind(), weight, lora: None }
    }

    /// Puts an adapter beside the table.
    ///
    /// # Errors
    /// [`Error::Shape`] when it does not fit.
    pub fn set_adapter(&mut self, lora: Lora) -> Result<()> {
        let (table, a, b) = (self.weight.size(), lora.a.size(), lora.b.size());
        if [a[1], b[0]] != table[..] {
            return Err(Error::Shape {
                what: "lora_embedding_A and lora_embedding_B",
                expected: format!("[r, {}] and [{}, r]", table[0], table[1]),
                got: format!("{a:?} and {b:?}"),
            });
        }
        self.lora = Some(lora);
        Ok(())
    }

    /// Looks rows up.
    ///
    /// # Shapes
    /// `ids` `[tokens]` int64 in `[0, vocab)`; the result is `[tokens, hidden]`, in [`kind`](Self::kind).
    ///
    /// # Errors
    /// [`Error::Torch`] for an id outside the table.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let rows = Tensor::f_embedding(&self.weight, ids, -1, false, false)?.f_to_kind(self.kind)?;
        let Some(lora) = &self.lora else { return Ok(rows) };
        let mut low = Tensor::f_embedding(&lora.a.f_tr()?, ids, -1, false, false)?;
        if let Some(gate) = &lora.gate {
            low = low.f_mul(gate)?;
        }
        let update = low.f_matmul(&lora.b.f_tr()?)?.f_mul_scalar(lora.scale)?.f_to_kind(rows.kind())?;
        let sum = rows.f_add(&update)?;
        Ok(match &lora.magnitude {
            Some(m) => sum.f_mul(&magnitude_ratio(&self.weight.f_tr()?.into(), lora, m, sum.kind())?)?,
            None => sum,
        })
    }
}
