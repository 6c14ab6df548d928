//! Single rows of an embedding, and of a head that shares it, that are trained while the rest is frozen.
//!
//! Rows are replaced and not changed by a sum, as PEFT has it: what is saved does not depend on what the base held there.
//! Neither pass makes anything of the size of the table that needs a gradient.

use crate::error::{Error, Result};
use tch::{Device, Kind, Tensor};

/// Rows in the place of those of a table.
#[derive(Debug)]
pub struct TokenRows {
    /// The rows that are replaced.
    pub ids: Vec<i64>,
    /// `[n, dim]`, what stands there; fp32 (fp64 in float64 checks).
    pub rows: Tensor,
    /// `[n]` int64: the ids.
    index: Tensor,
    /// `[vocab]` int64: which of the rows stands for an id; -1 for the table's own.
    slots: Tensor,
}

impl TokenRows {
    /// Rows for some ids of a table of `vocab` rows.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of rows than ids, [`Error::Value`] for an id that is not in the table or is there
    /// twice.
    pub fn new(ids: &[i64], rows: Tensor, vocab: i64) -> Result<Self> {
        let size = rows.size();
        if size.len() != 2 || size[0] != ids.len() as i64 {
            return Err(Error::Shape {
                what: "rows of trained tokens",
                expected: format!("[{}, dim]", ids.len()),
                got: format!("{size:?}"),
            });
        }
        let mut slots = vec![-1i64; usize::try_from(vocab).unwrap_or(0)];
        for (slot, &id) in ids.iter().enumerate() {
            let place = usize::try_from(id).ok().and_then(|id| slots.get_mut(id)).filter(|place| **place == -1);
            let Some(place) = place else {
                let expected = "an id of the vocabulary, named once";
                return Err(Error::Value { what: "trainable_token_indices", value: id.to_string(), expected });
            };
            *place = slot as i64;
        }
        let on = |list: &[i64], device: Device| Tensor::f_from_slice(list)?.f_to_device(device);
        let device = rows.device();
        Ok(Self { ids: ids.to_vec(), index: on(ids, device)?, slots: on(&slots, device)?, rows })
    }

    /// Another holder of the same rows: a head that is tied to its embedding.
    pub fn shared(&self) -> Self {
        Self {
            ids: self.ids.clone(),
            rows: self.rows.shallow_clone(),
            index: self.index.shallow_clone(),
            slots: self.slots.shallow_clone(),
        }
    }

    /// Whether the two hold the same rows, so that one is trained with the other.
    pub fn shares(&self, other: &Self) -> bool {
        self.rows.data_ptr() == other.rows.data_ptr()
    }

    /// What was looked up in the table, with the rows that are replaced.
    ///
    /// # Shapes
    /// `looked_up` `[tokens, dim]` for `ids` `[tokens]`; the result is as the first.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn in_embedding(&self, looked_up: &Tensor, ids: &Tensor) -> Result<Tensor> {
        let slots = self.slots.f_index_select(0, ids)?;
        let own = Tensor::f_embedding(&self.rows, &slots.f_clamp_min(0)?, -1, false, false)?;
        Ok(own.f_to_kind(looked_up.kind())?.f_where_self(&slots.f_ge(0)?.f_unsqueeze(1)?, looked_up)?)
    }

    /// The logits of a head with the columns that are replaced.
    ///
    /// # Shapes
    /// `hidden` `[n, dim]`, `logits` `[n, vocab]`; the result is as the second.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn in_logits(&self, hidden: &Tensor, logits: &Tensor) -> Result<Tensor> {
        let own = hidden.f_matmul(&self.rows.f_to_kind(hidden.kind())?.f_tr()?)?;
        Ok(logits.f_index_copy(1, &self.index, &own)?)
    }

    /// The table with the rows that are replaced, in its own dtype.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn merged(&self, table: &Tensor) -> Result<Tensor> {
        Ok(table.f_detach()?.f_index_copy(0, &self.index, &self.rows.f_detach()?.f_to_kind(table.kind())?)?)
    }

    /// The same rows as a table has them, to begin with.
    ///
    /// # Errors
    /// What libtorch reports, as for an id that is not there.
    pub fn of_table(table: &Tensor, ids: &[i64]) -> Result<Tensor> {
        let kind = if table.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let index = Tensor::f_from_slice(ids)?.f_to_device(table.device())?;
        Ok(table.f_detach()?.f_index_select(0, &index)?.f_to_kind(kind)?)
    }
}
