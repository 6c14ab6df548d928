//! What adapters of stacked experts and of single tokens change in a base.

use crate::change::{Delta, Rows, Step};
use crate::error::{Error, Result};
use crate::plan::Planner;
use crate::tied::TiedPair;
use lora_core::{LoraSpec, StackedLora};
use lora_format::{AdapterConfig, Checkpoint, LoraTensors, STACKED, turn_stacked};
use std::path::Path;
use tch::Tensor;

/// How checkpoints name the matrices of single experts: what stands before the number inside a block, and gate, up, down.
const SINGLE: [(&str, [&str; 3]); 2] =
    [("block_sparse_moe.experts", ["w1", "w3", "w2"]), ("mlp.experts", ["gate_proj", "up_proj", "down_proj"])];

/// Where a base holds the matrices of a stacked parameter.
enum Home {
    /// In one tensor `[E, out, in]`, under the parameter's own path.
    Stacked(Vec<i64>),
    /// In a tensor for each expert; for gate and up in two. The names of each expert, in the order of the rows.
    Single(Vec<Vec<String>>),
}

impl Home {
    fn of(base: &Checkpoint, adapter: &Path, path: &str) -> Result<Self> {
        if base.contains(path) {
            return Ok(Self::Stacked(base.info(path)?.shape.clone()));
        }
        let absent = || Error::NoSuchTensor {
            adapter: adapter.into(),
            base: base.dir().into(),
            tensor: path.into(),
            nearest: Vec::new(),
        };
        let (block, parameter) = path.split_once(".mlp.experts.").ok_or_else(absent)?;
        for (experts, [gate, up, down]) in SINGLE {
            let parts: &[&str] = if parameter == STACKED[0] { &[gate, up] } else { &[down] };
            let of = |e: usize| -> Vec<String> {
                parts.iter().map(|part| format!("{block}.{experts}.{e}.{part}.weight")).collect()
            };
            let names: Vec<Vec<String>> =
                (0..).map(of).take_while(|names| names.iter().all(|name| base.contains(name))).collect();
            if !names.is_empty() {
                return Ok(Self::Single(names));
            }
        }
        Err(absent())
    }

    /// Experts, width of the output and of the input.
    fn sizes(&self, base: &Checkpoint, path: &str) -> Result<(i64, i64, i64)> {
        let wrong = |name: &str, got: &[i64]| Error::Shape {
            adapter: base.dir().into(),
            tensor: name.into(),
            got: got.to_vec(),
            wanted: vec![-1; 2],
        };
        match self {
            Self::Stacked(shape) => match shape[..] {
                [experts, out, input] => Ok((experts, out, input)),
                _ => Err(wrong(path, shape)),
            },
            Self::Single(names) => {
                let (mut out, mut input) = (0, 0);
                for name in names.iter().take(1).flatten() {
                    let shape = &base.info(name)?.shape;
                    match shape[..] {
                        [o, i] => (out, input) = (out + o, i),
                        _ => return Err(wrong(name, shape)),
                    }
                }
                Ok((names.len() as i64, out, input))
            }
        }
    }
}

impl Planner<'_> {
    /// The tensors of the base that hold a stacked parameter.
    pub(crate) fn stacked_tensors(&self, adapter: &Path, path: &str) -> Result<Vec<String>> {
        Ok(match Home::of(self.base, adapter, path)? {
            Home::Stacked(_) => vec![path.into()],
            Home::Single(names) => names.into_iter().flatten().collect(),
        })
    }

    /// The update of each expert.
    pub(crate) fn add_stacked(
        &mut self,
        adapter: &Path,
        config: &AdapterConfig,
        path: &str,
        lora: &LoraTensors,
    ) -> Result<()> {
        let fail = |e: lora_core::Error| Error::merge(path, e);
        let spec = LoraSpec::new(config.rank_of(path)?, config.alpha_of(path)?, config.use_rslora).map_err(fail)?;
        let home = Home::of(self.base, adapter, path)?;
        let (experts, out, input) = home.sizes(self.base, path)?;
        let sizes = |a: &Tensor, b: &Tensor| (a.size()[0] / spec.r(), b.size()[0], a.size()[1]);
        let (mut a, mut b) = (lora.a.shallow_clone(), lora.b.shallow_clone());
        if sizes(&a, &b) == (experts, input, out) && input != out {
            // The version did not tell that A and B are the other way round.
            (a, b) = turn_stacked(&a, &b, spec.r()).map_err(|e| Error::merge(path, e))?;
        }
        if sizes(&a, &b) != (experts, out, input) {
            let (e, o, i) = sizes(&a, &b);
            let (got, wanted) = (vec![e, o, i], vec![experts, out, input]);
            return Err(Error::Shape { adapter: adapter.into(), tensor: path.into(), got, wanted });
        }
        let lora = StackedLora::from_parts(a, b, experts, spec.scale()).map_err(fail)?;
        match home {
            Home::Stacked(shape) => {
                self.check(adapter, path, shape)?;
                self.change(path).steps.push(Step::Stacked(lora));
            }
            Home::Single(names) => {
                for (names, (a, b)) in names.iter().zip(lora.parts().map_err(fail)?) {
                    let mut first = 0;
                    for name in names {
                        let rows = self.base.info(name)?.shape.first().copied().unwrap_or(0);
                        let left = b.f_narrow(0, first, rows).map_err(|e| Error::merge(name, e))?;
                        first += rows;
                        self.check(adapter, name, vec![rows, input])?;
                        let right = a.shallow_clone();
                        self.change(name).steps.push(Step::Delta(Delta { left, right, scale: spec.scale() }));
                    }
                }
            }
        }
        Ok(())
    }

    /// Rows of an embedding or a head; with `follows`, of the head that shares them, too.
    pub(crate) fn add_tokens(
        &mut self,
        adapter: &Path,
        config: &AdapterConfig,
        module: &str,
        rows: &Tensor,
        follows: Option<TiedPair>,
    ) -> Result<()> {
        let ids = config.trainable_token_indices.as_ref().and_then(|t| t.of(module)).unwrap_or_default();
        let weight = format!("{module}.weight");
        for name in std::iter::once(weight.as_str()).chain(follows.map(|pair| pair.head)) {
            let source = self.source(name);
            let vocab =
                if self.base.contains(&source) { self.base.info(&source)?.shape.first().copied() } else { None };
            self.check(adapter, name, vec![vocab.unwrap_or(0), rows.size()[1]])?;
            if let Some(id) = ids.iter().find(|id| Some(**id) >= vocab) {
                let (adapter, tensor) = (adapter.into(), name.into());
                return Err(Error::TokenOutside { adapter, tensor, id: *id, rows: vocab.unwrap_or(0) });
            }
            let step = Rows { ids: ids.to_vec(), rows: rows.shallow_clone() };
            self.change(name).steps.push(Step::Rows(step));
        }
        Ok(())
    }
}
