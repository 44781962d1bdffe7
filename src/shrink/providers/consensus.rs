//! Consensus of similarities, after "Layer Pruning with Consensus" (Mugnaini et al., arXiv 2411.14345): how much what the
//! classifier reads changes when a block alone is freed, by several measures that each rank the blocks; a block's cost is the sum
//! of its ranks.
//!
//! Read from the authors' code: features of the last layer before the classifier, a rank for each measure, the sum, and that the
//! lowest goes. Its measures are CKA, Wasserstein's distance and metrics of shapes; a block is bypassed there, and after each
//! that goes the network is finetuned and all is taken anew. Decided here: a block is made linear, as it will be, with renewed
//! batch-norm statistics; ranks are taken once; three measures that any number of images serves, [`Measures`]; ranks add up.

use rayon::prelude::*;

use super::{Asked, BlockCosts, Done, Provider, all_but, check_active, each_candidate};
use crate::Result;
use crate::model::Model;
use crate::shrink::surgery::linearise;

/// Images whose features are compared at most: those of all pairs of images are.
const MAX_IMAGES: usize = 512;

/// The sum of a block's ranks by three measures of how much features change.
#[derive(Debug, Clone, Copy)]
pub struct Consensus;

impl Provider for Consensus {
    fn costs(&self, asked: &Asked<'_>, done: Done<'_>) -> Result<Option<BlockCosts>> {
        let Asked { judge, model, candidates, linearise: surgery, .. } = *asked;
        check_active(model)?;
        let features = |model: &Model| Ok(Features::new(&judge.features(model, MAX_IMAGES)?));
        let change = |original: &Features, block| {
            let freed = linearise(model, &all_but(candidates.len(), block), surgery)?;
            Ok(original.measures(&features(&freed)?))
        };
        let (_, found) = each_candidate(candidates, done, || features(model), change)?;
        let mut ranks = rank_sums(&found.iter().copied().flatten().collect::<Vec<_>>()).into_iter();
        Ok(Some(BlockCosts::new(found.iter().map(|measures| measures.and_then(|_| ranks.next())).collect())))
    }
}

/// How far features are from others of the same images; 0 where they are the same.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measures {
    /// 1 − CKA with a linear kernel: ⟨K, L⟩ / (‖K‖·‖L‖), K and L the products of all pairs of images.
    pub cka: f64,
    /// Wasserstein's distance W₁ between the values of a feature, the mean over the features.
    pub wasserstein: f64,
    /// The angle between the two as shapes, arccos(⟨X, Y⟩ / (‖X‖·‖Y‖)): the classifier reads features by place, so that none is
    /// turned or exchanged.
    pub angle: f64,
}

/// Features of some images, one list for each feature, less their means.
#[derive(Debug, Clone, PartialEq)]
pub struct Features {
    /// As they are, each feature sorted.
    sorted: Vec<Vec<f64>>,
    /// Less their means, by image.
    centred: Vec<Vec<f64>>,
}

impl Features {
    /// From values by image.
    pub fn new(values: &[Vec<f32>]) -> Self {
        let (images, features) = (values.len().max(1), values.first().map_or(0, Vec::len));
        let column = |feature: usize| values.iter().map(move |image| f64::from(image[feature]));
        let means: Vec<f64> = (0..features).map(|feature| column(feature).sum::<f64>() / images as f64).collect();
        let sort = |feature: usize| {
            let mut values: Vec<f64> = column(feature).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let centre = |image: &Vec<f32>| image.iter().zip(&means).map(|(&v, mean)| f64::from(v) - mean).collect();
        Self { sorted: (0..features).map(sort).collect(), centred: values.iter().map(centre).collect() }
    }

    /// How far others of the same images and sizes are.
    pub fn measures(&self, other: &Self) -> Measures {
        let (x, y) = (&self.centred, &other.centred);
        let rows = |i: usize| {
            // A row of both products of pairs, and what it adds to the three sums.
            (0..x.len()).fold([0.0; 3], |sums, j| {
                let (k, l) = (dot(&x[i], &x[j]), dot(&y[i], &y[j]));
                [sums[0] + k * l, sums[1] + k * k, sums[2] + l * l]
            })
        };
        let pairs: Vec<[f64; 3]> = (0..x.len()).into_par_iter().map(rows).collect();
        let sum = |index: usize| pairs.iter().map(|sums| sums[index]).sum::<f64>();
        let of_all = |a: &[Vec<f64>], b: &[Vec<f64>]| a.iter().zip(b).map(|(a, b)| dot(a, b)).sum::<f64>();
        let distance = |(a, b): (&Vec<f64>, &Vec<f64>)| {
            a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>() / a.len().max(1) as f64
        };
        let wasserstein = self.sorted.iter().zip(&other.sorted).map(distance).sum::<f64>();
        Measures {
            cka: 1.0 - cosine(sum(0), sum(1), sum(2)),
            wasserstein: wasserstein / self.sorted.len().max(1) as f64,
            angle: cosine(of_all(x, y), of_all(x, x), of_all(y, y)).acos(),
        }
    }
}

/// The sums of the ranks by each measure, from 0 on: equal values have the same rank.
pub fn rank_sums(measures: &[Measures]) -> Vec<f64> {
    let by: [fn(&Measures) -> f64; 3] = [|m| m.cka, |m| m.wasserstein, |m| m.angle];
    let rank = |own: &Measures, of: fn(&Measures) -> f64| measures.iter().filter(|other| of(other) < of(own)).count();
    measures.iter().map(|own| by.iter().map(|&of| rank(own, of) as f64).sum()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// ⟨a, b⟩ / (‖a‖·‖b‖) from the three products; 0 where one of them has no length.
fn cosine(both: f64, own: f64, other: f64) -> f64 {
    let lengths = (own * other).sqrt();
    if lengths > 0.0 { (both / lengths).clamp(-1.0, 1.0) } else { 0.0 }
}
