//! What goes to and comes from a neighbouring stage: one `[tokens, hidden]` for each micro-batch.

use crate::error::Result;
use lora_torch::distributed::{Collective, Transfer};
use std::collections::VecDeque;
use tch::{Device, Kind, Tensor};

/// A neighbour. What it gives is taken from it while this stage still computes; what it is given leaves meanwhile, too.
pub(crate) struct Link<'a> {
    team: &'a dyn Collective,
    peer: u32,
    /// What numbers go as.
    sent_as: Kind,
    /// What they are computed as, and where.
    computed: (Kind, Device),
    /// The shapes of what is still to come, and the first of them that is on its way.
    coming: VecDeque<[i64; 2]>,
    arriving: Option<Transfer>,
    /// The shapes of what is to be given in turn, for a stage that has nothing to give.
    owed: VecDeque<[i64; 2]>,
    /// What was given, and may not have left.
    leaving: VecDeque<Transfer>,
}

impl<'a> Link<'a> {
    /// `passing` are the shapes of what passes; `coming` tells whether the neighbour gives as many.
    pub(crate) fn new(
        team: &'a dyn Collective,
        peer: u32,
        sent_as: Kind,
        computed: (Kind, Device),
        (passing, coming): (&[[i64; 2]], bool),
    ) -> Result<Self> {
        let coming = passing.iter().filter(|_| coming).copied().collect();
        let owed = passing.iter().copied().collect();
        let leaving = VecDeque::new();
        let mut link = Self { team, peer, sent_as, computed, coming, arriving: None, owed, leaving };
        link.expect()?;
        Ok(link)
    }

    /// Lets the next one come.
    fn expect(&mut self) -> Result<()> {
        let next = self.coming.pop_front().map(|shape| self.team.receive(&shape, self.sent_as, self.peer));
        self.arriving = next.transpose()?;
        Ok(())
    }

    /// The next that the neighbour gives.
    pub(crate) fn take(&mut self) -> Result<Tensor> {
        let (kind, device) = self.computed;
        let arrived = match self.arriving.take() {
            Some(transfer) => self.team.arrive(transfer)?,
            None => Tensor::f_zeros([0, 0], (self.sent_as, Device::Cpu))?,
        };
        self.expect()?;
        Ok(arrived.f_to_device(device)?.f_to_kind(kind)?)
    }

    /// Gives the neighbour the next; zeros where there is nothing to give.
    pub(crate) fn give(&mut self, tensor: Option<&Tensor>) -> Result<()> {
        let shape = self.owed.pop_front().unwrap_or_default();
        let sent = match tensor {
            Some(tensor) => tensor.f_detach()?.f_to_kind(self.sent_as)?.f_to_device(Device::Cpu)?.f_contiguous()?,
            None => Tensor::f_zeros(shape, (self.sent_as, Device::Cpu))?,
        };
        self.leaving.push_back(self.team.send(&sent, self.peer)?);
        // A stage is never further ahead of its neighbour in training, and in an evaluation need not be.
        while self.leaving.len() > self.team.world() as usize {
            if let Some(oldest) = self.leaving.pop_front() {
                let _sent = self.team.arrive(oldest)?;
            }
        }
        Ok(())
    }

    /// Waits until all that was given has left.
    pub(crate) fn end(self) -> Result<()> {
        self.leaving.into_iter().try_for_each(|transfer| Ok(self.team.arrive(transfer).map(drop)?))
    }
}
