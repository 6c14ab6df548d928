//! The MLP of a block: gated, plain, or of experts.

use crate::block::Pass;
use crate::config::{Activation, ExpertsConfig, ModelConfig};
use crate::error::Result;
use crate::norm::Read;
use crate::stacked::StackedAdapters;
use lora_core::{LinearLayer, forward_many_of};
use lora_torch::{Gate, Origin, gated};
use tch::{Kind, Tensor};

/// Weights of an MLP.
#[derive(Debug)]
pub enum Mlp {
    /// `down(act(gate(x)) · up(x))`
    Gated(Gated),
    /// The same, where one layer gives the gate and then the rest.
    GatedTogether {
        /// `[2 · intermediate, hidden]`
        gate_up: LinearLayer,
        /// `[hidden, intermediate]`
        down: LinearLayer,
    },
    /// `down(act(up(x)))`
    Plain {
        /// `[intermediate, hidden]`
        up: LinearLayer,
        /// `[hidden, intermediate]`
        down: LinearLayer,
    },
    /// Each token goes through the experts that `router` ranks first.
    Experts {
        /// `[experts, hidden]`
        router: LinearLayer,
        /// The experts.
        experts: Vec<Gated>,
        /// Adapters of all experts together.
        stacked: StackedAdapters,
    },
}

/// Weights of a gated MLP.
#[derive(Debug)]
pub struct Gated {
    /// `[intermediate, hidden]`
    pub gate: LinearLayer,
    /// `[intermediate, hidden]`
    pub up: LinearLayer,
    /// `[hidden, intermediate]`
    pub down: LinearLayer,
}

impl Mlp {
    /// `[tokens, hidden]` to the same.
    ///
    /// # Errors
    /// What an operation reports.
    pub(crate) fn forward(&self, c: &ModelConfig, read: &Read, pass: Pass) -> Result<Tensor> {
        let (x, origin, dropout) = (read.tensor(), read.origin(pass.remake), pass.dropout);
        match self {
            Mlp::Gated(gated) => gated.forward(c.activation, read, pass),
            Mlp::GatedTogether { gate_up, down } => {
                let [both] = forward_many_of(x, origin, [gate_up], dropout)?;
                let parts = both.f_chunk(2, -1)?;
                down_of_gated(c.activation, &parts[0].f_contiguous()?, &parts[1].f_contiguous()?, down, pass)
            }
            Mlp::Plain { up, down } => {
                let [up] = forward_many_of(x, origin, [up], dropout)?;
                Ok(down.forward(&activate(c.activation, &up)?, dropout)?)
            }
            Mlp::Experts { router, experts, stacked } => match &c.experts {
                Some(settings) => sparse(c.activation, settings, router, (experts, stacked), x, pass),
                None => Ok(x.f_zeros_like()?),
            },
        }
    }
}

impl Gated {
    fn forward(&self, activation: Activation, read: &Read, pass: Pass) -> Result<Tensor> {
        let origin = read.origin(pass.remake);
        let [gate, up] = forward_many_of(read.tensor(), origin, [&self.gate, &self.up], pass.dropout)?;
        down_of_gated(activation, &gate, &up, &self.down, pass)
    }
}

/// `down(act(gate) · up)` (Shazeer, "GLU Variants Improve Transformer", 2020). What `down` reads is half as wide again as all that
/// the gate keeps, and cheap to make once more.
fn down_of_gated(activation: Activation, gate: &Tensor, up: &Tensor, down: &LinearLayer, pass: Pass) -> Result<Tensor> {
    let act = gate_of(activation);
    let product = gated(act, gate, up)?;
    let origin = pass.remake.then_some(Origin::Gated { act, gate, up });
    let [y] = forward_many_of(&product, origin, [down], pass.dropout)?;
    Ok(y)
}

fn gate_of(activation: Activation) -> Gate {
    match activation {
        Activation::Silu => Gate::Silu,
        Activation::Gelu => Gate::Gelu,
        Activation::GeluTanh => Gate::GeluTanh,
    }
}

fn activate(activation: Activation, x: &Tensor) -> Result<Tensor> {
    Ok(match activation {
        Activation::Silu => x.f_silu()?,
        Activation::Gelu => x.f_gelu("none")?,
        Activation::GeluTanh => x.f_gelu("tanh")?,
    })
}

/// Mixture of experts (Shazeer et al., 2017; Jiang et al., "Mixtral of Experts", 2024, section 2.1): the router's softmax
/// in fp32, the first `per_token` of it as weights. Every expert computes its own tokens and no other.
fn sparse(
    activation: Activation,
    settings: &ExpertsConfig,
    router: &LinearLayer,
    (experts, stacked): (&[Gated], &StackedAdapters),
    x: &Tensor,
    pass: Pass,
) -> Result<Tensor> {
    let wide = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let scores = router.forward(x, 0.0)?.f_softmax(-1, wide)?;
    let (mut weights, chosen) = scores.f_topk(settings.per_token, -1, true, true)?;
    if settings.normalised {
        weights = weights.f_div(&weights.f_sum_dim_intlist([-1i64].as_slice(), true, wide)?)?;
    }
    let weights = weights.f_to_kind(x.kind())?.f_view([-1])?;
    // Which expert each (token, choice) pair goes to; read once for the whole block.
    let pairs = Vec::<i64>::try_from(&chosen.f_contiguous()?.f_view([-1])?)?;
    let mut of_expert = vec![Vec::new(); experts.len()];
    for (pair, &expert) in pairs.iter().enumerate() {
        of_expert[expert as usize].push(pair as i64);
    }
    let mut sum = x.f_zeros_like()?;
    let stacked = stacked.parts()?;
    for (e, (expert, pairs)) in experts.iter().zip(&of_expert).enumerate().filter(|(_, (_, pairs))| !pairs.is_empty()) {
        let tokens: Vec<i64> = pairs.iter().map(|pair| pair / settings.per_token).collect();
        let place = |v: &[i64]| Tensor::f_from_slice(v)?.f_to_device(x.device());
        let (pairs, tokens) = (place(pairs)?, place(&tokens)?);
        let read = Read::Plain(x.f_index_select(0, &tokens)?);
        let y = match stacked.of(e, expert)? {
            Some(adapted) => adapted.forward(activation, &read, pass)?,
            None => expert.forward(activation, &read, pass)?,
        };
        let y = y.f_mul(&weights.f_index_select(0, &pairs)?.f_unsqueeze(1)?)?;
        sum = sum.f_index_add(0, &tokens, &y)?;
    }
    Ok(sum)
}
