//! Which segments a network has, by descriptions that come from the papers and not from the graph.

use std::collections::BTreeSet;

use depthshrinker::graph::{ChainConv, Interval, MergeKey, Positions};
use depthshrinker::shrink::select::kept_convs;
use libtest_mimic::Trial;
use rand::RngExt;

use crate::networks::{positions, random_network, rng};
use crate::trial;

/// A network as `docs/methods.md` 2.4 needs it: how many convolutions it has in blocks, where segments must end, what
/// residuals go from where to where, and where blocks end.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Description {
    pub depth: usize,
    breaks: Vec<usize>,
    residuals: Vec<(usize, usize)>,
    block_ends: Vec<usize>,
    has_linear_ends: bool,
}

impl Description {
    /// The segments: none has a break inside, and each holds a residual, lies in it, or is disjoint from it.
    pub fn segments(&self) -> Vec<(usize, usize)> {
        let fits = |&(st, end): &(usize, usize)| {
            let crosses_break = self.breaks.iter().any(|at| st < *at && *at < end);
            let splits_residual = self.residuals.iter().any(|&(from, to)| {
                let holds = st <= from && to <= end;
                let within = from <= st && end <= to;
                let disjoint = end <= from || to <= st;
                !(holds || within || disjoint)
            });
            !crosses_break && !splits_residual
        };
        (0..self.depth).flat_map(|st| (st + 1..=self.depth).map(move |end| (st, end))).filter(fits).collect()
    }

    /// The extended segments as Kim et al. list them, with or without all variants.
    fn extended(&self, all: bool) -> Vec<(usize, usize, bool, bool)> {
        let is_end = |position: usize| self.has_linear_ends && self.block_ends.contains(&position);
        let mut extended = Vec::new();
        for (st, end) in self.segments() {
            let both = vec![true, false];
            let (acts_st, acts_end) = match (all, is_end(st), is_end(end)) {
                (true, first, last) => {
                    (if first { both.clone() } else { vec![true] }, if last { both } else { vec![true] })
                }
                (false, _, _) if st == 0 => (vec![true], vec![true]),
                (false, true, _) => (both, vec![true]),
                (false, false, true) => (vec![true], both),
                (false, false, false) => (vec![true], vec![true]),
            };
            for act_st in acts_st {
                extended.extend(acts_end.iter().map(|&act_end| (st, end, act_st, act_end)));
            }
        }
        extended
    }
}

/// Networks of inverted residuals, of which the first stage does not expand.
fn inverted_residuals(stages: &[(usize, usize)]) -> Description {
    let mut network = Description { has_linear_ends: true, ..Description::default() };
    for (stage, &(repeats, stride)) in stages.iter().enumerate() {
        for repeat in 0..repeats {
            let st = network.depth;
            network.depth += if stage == 0 { 2 } else { 3 };
            network.block_ends.push(network.depth);
            if repeat > 0 {
                network.residuals.push((st, network.depth));
            } else if stride > 1 {
                network.breaks.push(network.depth);
            }
        }
    }
    network
}

/// ResNets: every block has a residual or a projection over all of it, and nothing but 1×1 convolutions of the same
/// block follows a stride.
fn resnet(repeats: [usize; 4], convs: usize) -> Description {
    let mut network = Description::default();
    for (stage, &repeats) in repeats.iter().enumerate() {
        for repeat in 0..repeats {
            let st = network.depth;
            network.depth += convs;
            network.block_ends.push(network.depth);
            network.residuals.push((st, network.depth));
            if stage > 0 && repeat == 0 {
                // The first 3×3 of a basic block, the whole bottleneck.
                network.breaks.push(if convs == 2 { st + 1 } else { network.depth });
            }
        }
    }
    network
}

pub fn mobilenet() -> Description {
    let network = inverted_residuals(&[(1, 1), (2, 2), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1)]);
    assert_eq!((network.depth, &network.breaks[..]), (50, &[5, 11, 20, 41][..]));
    let residuals = [(5, 8), (11, 14), (14, 17), (20, 23), (23, 26), (26, 29), (32, 35), (35, 38), (41, 44), (44, 47)];
    assert_eq!(network.residuals, residuals);
    network
}

pub fn vgg() -> Description {
    Description {
        depth: 16,
        breaks: vec![2, 4, 8, 12],
        block_ends: (2..=16).step_by(2).collect(),
        ..Description::default()
    }
}

/// What the papers, and programs that follow them, count.
struct Counts {
    segments: usize,
    extended: Option<(usize, usize)>,
    candidates: Option<usize>,
}

fn counts(
    segments: usize,
    extended: impl Into<Option<(usize, usize)>>,
    candidates: impl Into<Option<usize>>,
) -> Counts {
    Counts { segments, extended: extended.into(), candidates: candidates.into() }
}

fn network_rows() -> Vec<(&'static str, Description, Option<Counts>)> {
    let lite = inverted_residuals(&[(1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1)]);
    let mnasnet = inverted_residuals(&[(1, 1), (3, 2), (3, 2), (3, 2), (2, 1), (4, 2), (1, 1)]);
    vec![
        ("mobilenetv2-1.0", mobilenet(), Some(counts(171, (315, 405), 391))),
        ("mobilenetv2-1.4", mobilenet(), Some(counts(171, (315, 405), 391))),
        ("vgg19_bn", vgg(), Some(counts(36, (36, 36), None))),
        ("resnet34", resnet([3, 4, 6, 3], 2), Some(counts(62, None, 150))),
        ("resnet18", resnet([2, 2, 2, 2], 2), None),
        ("resnet50", resnet([3, 4, 6, 3], 3), None),
        ("efficientnet-lite0", lite, None),
        ("mnasnet-1.0", mnasnet, None),
    ]
}

/// Exactly the described segments in their order, the extended ones likewise, and the published counts.
fn enumerates(name: &str, described: &Description, published: Option<Counts>) {
    let positions = positions(name);
    let found: Vec<(usize, usize)> = positions.segments().map(|at| (at.st, at.end)).collect();
    // What would have more than 2²⁶ weights is no convolution that can be built.
    let fits = |st: usize, end: usize| {
        let convs = positions.convs_in(Interval { st, end });
        let kernel = 1 + convs.iter().map(|conv| conv.kernel() - 1).sum::<usize>();
        kernel * kernel * convs[0].conv.c_in * convs[convs.len() - 1].conv.c_out <= 1 << 26
    };
    let all = described.segments();
    let listed: Vec<(usize, usize)> = all.iter().copied().filter(|&(st, end)| fits(st, end)).collect();
    assert_eq!((positions.depth(), &found), (described.depth, &listed));
    let has_larger = ["resnet50", "efficientnet-lite0"].contains(&name);
    assert_eq!(listed.len() < all.len(), has_larger, "{} of {}", listed.len(), all.len());
    let ends: Vec<usize> = positions.blocks().iter().map(|block| block.at.end).collect();
    assert_eq!(ends, described.block_ends);
    let extended = |list: Vec<depthshrinker::graph::ExtendedSegment>| -> Vec<(usize, usize, bool, bool)> {
        list.iter().map(|s| (s.at.st, s.at.end, s.act_st, s.act_end)).collect()
    };
    let of_listed = |all: bool| -> Vec<_> { described.extended(all).into_iter().filter(|s| fits(s.0, s.1)).collect() };
    assert_eq!(extended(positions.extended_segments()), of_listed(false));
    assert_eq!(extended(positions.all_extended_segments()), of_listed(true));
    // Whatever is listed is a segment of the graph.
    assert!(positions.segments().all(|at| positions.segment(at).is_some()));
    let Some(published) = published else { return };
    assert_eq!(found.len(), published.segments);
    if let Some(counts) = published.extended {
        assert_eq!((positions.extended_segments().len(), positions.all_extended_segments().len()), counts);
    }
    if let Some(candidates) = published.candidates {
        assert_eq!(positions.candidates().count(), candidates);
    }
}

/// Every set of convolutions of a segment that holds those which cannot be pruned, and is not empty, with what it
/// becomes.
fn subsets(convs: &[ChainConv]) -> Vec<(Vec<usize>, MergeKey)> {
    let is_irreducible = |conv: &ChainConv| {
        conv.conv.c_in != conv.conv.c_out || conv.conv.window.stride_h > 1 || conv.conv.window.stride_w > 1
    };
    let mut sets = vec![Vec::new()];
    for (index, conv) in convs.iter().enumerate() {
        let with: Vec<Vec<usize>> = sets.iter().map(|set| [&set[..], &[index]].concat()).collect();
        if is_irreducible(conv) {
            sets = with;
        } else {
            sets.extend(with);
        }
    }
    let key = |set: &[usize]| MergeKey {
        kernel: 1 + set.iter().map(|&index| convs[index].conv.window.k_h - 1).sum::<usize>(),
        depthwise: set.iter().all(|&index| convs[index].conv.groups > 1),
    };
    sets.into_iter().filter(|set| !set.is_empty()).map(|set| (set.clone(), key(&set))).collect()
}

/// The candidates are what the subsets of a segment's convolutions become, and of the subsets of one candidate that of
/// the largest norm is kept. Without norms the choice is known exactly where all of the largest sets are one.
fn prunes(positions: &Positions, longest: usize) {
    let mut rng = rng(5);
    let norms: Vec<f64> = (0..positions.depth()).map(|_| f64::from(rng.random_range(1..1000_u32))).collect();
    for at in positions.segments().filter(|at| at.len() <= longest) {
        let subsets = subsets(positions.convs_in(at));
        let keys: BTreeSet<MergeKey> = subsets.iter().map(|(_, key)| *key).collect();
        assert_eq!(positions.merge_keys(at), keys, "{at}");
        for key in keys {
            let of_key = || subsets.iter().filter(|(_, k)| *k == key).map(|(set, _)| set);
            let norm = |set: &[usize]| set.iter().map(|&position| norms[position - 1]).sum::<f64>();
            let shifted = |set: &Vec<usize>| set.iter().map(|index| at.st + index + 1).collect::<Vec<usize>>();
            let largest = of_key().map(|set| norm(&shifted(set))).fold(0.0, f64::max);
            let kept = kept_convs(positions, at, key, Some(&norms)).unwrap();
            assert!(of_key().any(|set| shifted(set) == kept), "{at} {key}: {kept:?}");
            assert_eq!(norm(&kept), largest, "{at} {key}");
            let most = of_key().map(Vec::len).max().unwrap();
            let maximal: Vec<_> = of_key().filter(|set| set.len() == most).collect();
            match kept_convs(positions, at, key, None) {
                Some(forced) => assert_eq!(maximal.iter().map(|set| shifted(set)).collect::<Vec<_>>(), [forced]),
                None => assert!(of_key().count() > 1, "{at} {key}"),
            }
        }
    }
}

/// What the solution that LayerMerge's authors show prunes, they can only prune: nothing else gives these kernels.
fn forced_by_the_key() {
    let positions = positions("mobilenetv2-1.0");
    for (st, end, kernel, pruned) in [(0, 5, 3, 1), (5, 8, 1, 7), (11, 14, 1, 13), (35, 38, 1, 37)] {
        let at = Interval { st, end };
        let kept = kept_convs(&positions, at, MergeKey { kernel, depthwise: false }, None).unwrap();
        assert_eq!(kept, (st + 1..=end).filter(|&p| p != pruned).collect::<Vec<_>>());
    }
    // Either of two depthwise convolutions can go.
    let key = MergeKey { kernel: 3, depthwise: false };
    assert_eq!(kept_convs(&positions, Interval { st: 11, end: 17 }, key, None), None);
}

fn refuses_networks_without_blocks() {
    let mut graph = crate::networks::network("mobilenetv2-0.1");
    graph.blocks.clear();
    let problem = graph.positions().unwrap_err().to_string();
    assert!(problem.contains("no convolutions in blocks") && problem.lines().count() == 1, "{problem}");
}

pub fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = network_rows()
        .into_iter()
        .map(|(name, described, published)| {
            trial(format!("positions/{name}"), move || enumerates(name, &described, published))
        })
        .collect();
    // The longest segments of a ResNet have more sets than can be gone through.
    for (name, longest) in [("mobilenetv2-1.0", 21), ("resnet34", 8), ("vgg19_bn", 4), ("efficientnet-lite0", 12)] {
        trials.push(trial(format!("candidates/{name}"), move || prunes(&positions(name), longest)));
    }
    trials.push(trial("candidates/random networks", || {
        for seed in 0..100 {
            prunes(&random_network(&mut rng(seed), 3).positions().unwrap(), 9);
        }
    }));
    trials.push(trial("candidates/forced", forced_by_the_key));
    trials.push(trial("positions/without blocks", refuses_networks_without_blocks));
    trials
}
