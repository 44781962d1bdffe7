//! The exchange between replicas: the mean of their gradients, and the updated weights. Both go through the host, which adds
//! in the order of the replicas, so that a step yields the same bits every time.

use super::replica::Replica;
use crate::Result;
use crate::device::float_mode::flush_subnormals;
use crate::ops::team::each_chunk;

/// Elements that one task adds.
const CHUNK: usize = 1 << 14;

/// The host's memory for the exchange, as long as the flat buffers of trained parameters.
#[derive(Debug, Default)]
pub(super) struct Exchange {
    sum: Vec<f32>,
    part: Vec<f32>,
}

impl Exchange {
    /// Writes the mean of all gradients, weighted by the images of each replica, to the first replica.
    ///
    /// # Errors
    /// When a device fails.
    pub fn reduce(&mut self, replicas: &mut [Replica<'_>]) -> Result<()> {
        let shares = shares(replicas);
        for (at, (replica, share)) in replicas.iter_mut().zip(shares).enumerate() {
            let (_, gradients, _) = replica.engine.for_update();
            self.sum.resize(gradients.len(), 0.0);
            self.part.resize(gradients.len(), 0.0);
            gradients.read(&mut self.part)?;
            add_scaled(&mut self.sum, &self.part, share, at > 0);
        }
        let (_, gradients) = replicas[0].engine.trainable();
        gradients.write(&self.sum)
    }

    /// Copies the first replica's weights to the others.
    ///
    /// # Errors
    /// When a device fails.
    pub fn spread(&mut self, replicas: &mut [Replica<'_>]) -> Result<()> {
        let (first, others) = replicas.split_at_mut(1);
        first[0].engine.for_update().0.read(&mut self.part)?;
        others.iter_mut().try_for_each(|replica| replica.engine.trainable().0.write(&self.part))
    }
}

/// Mean over the replicas of a few numbers of each, weighted by their images; those of one replica as they are.
///
/// # Errors
/// What `of` returns.
pub(super) fn mean(replicas: &[Replica<'_>], mut of: impl FnMut(&Replica<'_>) -> Result<Vec<f32>>) -> Result<Vec<f32>> {
    let mut sum = Vec::new();
    for (at, (replica, share)) in replicas.iter().zip(shares(replicas)).enumerate() {
        let part = of(replica)?;
        sum.resize(part.len(), 0.0);
        add_scaled(&mut sum, &part, share, at > 0);
    }
    Ok(sum)
}

/// Share of each replica in the batch.
fn shares(replicas: &[Replica<'_>]) -> Vec<f32> {
    let all: usize = replicas.iter().map(Replica::images).sum();
    replicas.iter().map(|replica| replica.images() as f32 / all as f32).collect()
}

/// sum (+)= share·part.
fn add_scaled(sum: &mut [f32], part: &[f32], share: f32, accumulate: bool) {
    each_chunk(sum, CHUNK, |chunk, sum| {
        let part = &part[chunk * CHUNK..][..sum.len()];
        flush_subnormals(|| {
            sum.iter_mut().zip(part).for_each(|(sum, part)| {
                let own = share * part;
                *sum = if accumulate { *sum + own } else { own };
            });
        });
    });
}
