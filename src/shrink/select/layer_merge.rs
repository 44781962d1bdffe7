//! LayerMerge (Kim et al., "LayerMerge: Neural Network Depth Compression through Layer Pruning and Merging", ICML 2024,
//! as its authors' code has it): which convolutions stay and which activations, so that merged kernels grow less.

use std::collections::{BTreeMap, BTreeSet};

use super::pareto::{Arc, States};
use super::{MergedSegment, Solution, within};
use crate::graph::{Interval, MergeKey, Positions};
use crate::measure::LatencyTable;
use crate::shrink::importance::Importance;
use crate::{Error, Result};

/// The segments and keys of the highest sum of exp(importance / 100) that take no more than `budget_ms`:
///
/// ```text
/// M[t, j] = max over i < j and keys of M[t − T[i, j, key], i] + I[i, j, key].
/// ```
///
/// Position j keeps an activation if it had one, or if the segment that ends there holds more than one convolution.
/// `norms` are the sums of the magnitudes of each convolution's weights, by position: of the sets of convolutions that
/// give a key the one with the largest sum stays. Without norms, [`Solution::pruned`] is known only where the keys
/// leave no choice.
///
/// # Errors
/// A table without keys or of another network, a candidate without an importance, or a budget below the fastest
/// selection, which the message names.
pub fn layer_merge(
    positions: &Positions,
    table: &LatencyTable,
    importance: &Importance,
    norms: Option<&[f64]>,
    budget_ms: f64,
) -> Result<Solution> {
    table.check_columns(true, false)?;
    table.check(positions)?;
    importance.check_times(table)?;
    if let Some((at, key)) = positions.candidates().find(|&(at, key)| importance.keyed(at, key).is_none()) {
        return Err(importance.missing(format!("{at} with {key}")));
    }
    layer_merge_among(positions, table, importance, norms, budget_ms)
}

/// As [`layer_merge`], among the candidates that have a time and an importance.
///
/// # Errors
/// An importance without a time, or a budget below the fastest selection, which the message names.
pub fn layer_merge_among(
    positions: &Positions,
    table: &LatencyTable,
    importance: &Importance,
    norms: Option<&[f64]>,
    budget_ms: f64,
) -> Result<Solution> {
    importance.check_times(table)?;
    if let Some(norms) = norms.filter(|norms| norms.len() != positions.depth()) {
        let (got, depth) = (norms.len(), positions.depth());
        return Err(Error::Config(format!("{got} norms for {depth} convolutions; give one for each")));
    }
    let (mut into, mut segments) = (vec![Vec::new(); table.depth() + 1], vec![Vec::new(); table.depth() + 1]);
    for (at, key) in positions.candidates() {
        let row = table.rows_of(at).find(|row| row.key == Some(key));
        let (Some(points), Some(row)) = (importance.keyed(at, key), row) else { continue };
        into[at.end].push(Arc { from: at.st, time: row.time_ms, value: (points / 100.0).exp() });
        segments[at.end].push(MergedSegment { st: at.st, end: at.end, kernel: key.kernel, depthwise: key.depthwise });
    }
    let path = within(&States { start: table.fixed_ms(), into, ends: vec![table.depth()] }, budget_ms)?;

    let merged: Vec<MergedSegment> = path.arcs.iter().map(|&(state, arc)| segments[state][arc]).collect();
    let boundaries = std::iter::once(0).chain(merged.iter().map(|segment| segment.end)).collect();
    let is_activated = |s: &&MergedSegment| s.end > s.st + 1 || positions.convs()[s.end - 1].has_activation();
    let activations = merged.iter().filter(is_activated).map(|segment| segment.end).collect();
    let kept = merged.iter().map(|s| kept_convs(positions, (s.st, s.end).into(), s.key(), norms));
    let kept = kept.collect::<Option<Vec<_>>>().map(|kept| kept.into_iter().flatten().collect::<BTreeSet<usize>>());
    let pruned = kept.map(|kept| (1..=positions.depth()).filter(|position| !kept.contains(position)).collect());
    let solution = Solution::new(activations, boundaries, path.time);
    Ok(Solution { objective: Some(path.value), merged, pruned, ..solution })
}

/// Convolutions of one kernel and kind: positions of those that cannot be pruned, and of the others by norm, largest
/// first.
#[derive(Debug, Default)]
struct Kind {
    irreducible: Vec<usize>,
    reducible: Vec<usize>,
}

/// The positions of the convolutions that stay so that a segment becomes `key`: the irreducible ones, and of each
/// kernel and kind so many of the largest norm. `None` where norms would have to decide and are not given.
///
/// That a set of these has the largest norm of all that give the key follows from norms being sums of magnitudes: a set
/// gains by any convolution that is added to it.
pub fn kept_convs(positions: &Positions, at: Interval, key: MergeKey, norms: Option<&[f64]>) -> Option<Vec<usize>> {
    let norm = |position: usize| norms.map_or(1.0, |norms| norms[position - 1]);
    let mut kinds: BTreeMap<(usize, bool), Kind> = BTreeMap::new();
    for (position, conv) in (at.st + 1..).zip(positions.convs_in(at)) {
        let kind = kinds.entry((conv.kernel(), conv.is_depthwise())).or_default();
        if conv.is_reducible() { kind.reducible.push(position) } else { kind.irreducible.push(position) }
    }
    for kind in kinds.values_mut() {
        kind.reducible.sort_by(|&a, &b| norm(b).total_cmp(&norm(a)));
    }
    let choices = counts(&kinds, key);
    let set = |counts: &Vec<usize>| -> Vec<usize> {
        let of = |(kind, &count): (&Kind, &usize)| [&kind.irreducible[..], &kind.reducible[..count]].concat();
        let mut set: Vec<usize> = kinds.values().zip(counts).flat_map(of).collect();
        set.sort_unstable();
        set
    };
    if norms.is_none() {
        let is_forced = |counts: &Vec<usize>| {
            kinds.values().zip(counts).all(|(kind, &count)| count == 0 || count == kind.reducible.len())
        };
        return match &choices[..] {
            [only] if is_forced(only) => Some(set(only)),
            _ => None,
        };
    }
    let total = |set: &Vec<usize>| set.iter().map(|&position| norm(position)).sum::<f64>();
    choices.iter().map(set).max_by(|a, b| total(a).total_cmp(&total(b)))
}

/// How many reducible convolutions of each kind may stay so that the whole becomes `key`; those of kernel 1 that make
/// no difference all stay.
fn counts(kinds: &BTreeMap<(usize, bool), Kind>, key: MergeKey) -> Vec<Vec<usize>> {
    let mut choices = vec![Vec::new()];
    for (&(kernel, depthwise), kind) in kinds {
        let all = kind.reducible.len();
        let stays_out = key.depthwise && !depthwise;
        let range = match (stays_out, kernel) {
            (true, _) => 0..=0,
            // Of a dense segment, or of depthwise ones alone, a 1×1 changes neither size nor kind. Whether one of them
            // has to be there to make it dense is seen below.
            (false, 1) => all..=all,
            _ => 0..=all,
        };
        choices = choices
            .iter()
            .flat_map(|counts: &Vec<usize>| range.clone().map(move |count| [&counts[..], &[count]].concat()))
            .collect();
    }
    let gives_key = |counts: &Vec<usize>| {
        let kept = || kinds.iter().zip(counts).map(|((&kind, of), count)| (kind, of.irreducible.len() + count));
        let size = 1 + kept().map(|((kernel, _), count)| (kernel - 1) * count).sum::<usize>();
        let is_depthwise = kept().all(|((_, depthwise), count)| depthwise || count == 0);
        let is_empty = kept().all(|(_, count)| count == 0);
        !is_empty && size == key.kernel && is_depthwise == key.depthwise
    };
    choices.retain(gives_key);
    choices
}
