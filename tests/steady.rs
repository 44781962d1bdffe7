//! A steady pass asks for no memory: what it needs was planned with the engine, or is kept by the threads from the pass before.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use depthshrinker::config::Config;
use depthshrinker::device::Device;
use depthshrinker::engine::{Engine, EngineOptions, Fusion};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::pipeline::fully_merged;
use depthshrinker::shape::Shape;

/// Counts what is asked for, and hands it on to the system.
struct Counting;

static COUNT: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(size.saturating_sub(layout.size()), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations and bytes of each of some passes, the first of which prepare what the others reuse.
fn asked_for(passes: usize, mut pass: impl FnMut()) -> Vec<(usize, usize)> {
    let of_pass = |_| {
        let before = (COUNT.load(Ordering::Relaxed), BYTES.load(Ordering::Relaxed));
        pass();
        (COUNT.load(Ordering::Relaxed) - before.0, BYTES.load(Ordering::Relaxed) - before.1)
    };
    (0..passes).map(of_pass).collect()
}

fn engine(network: &str, merged: bool, batch: usize, training: bool) -> Engine {
    let options = NetworkOptions::new(Shape::new(64, 64, 3), 10);
    let model = Model::initialise(build(network, &options).unwrap(), 0).unwrap();
    let model = match merged {
        true => fully_merged(&model, None, &Config::default()).unwrap().expect("blocks merge"),
        false => model,
    };
    let options = EngineOptions { batch, fusion: Fusion::OnLoad, training, taps: Vec::new() };
    Engine::new(&Device::Cpu, &model, &options).unwrap()
}

// One test: what others ask for meanwhile would count too.
#[test]
fn a_steady_pass_asks_for_no_memory() {
    const PASSES: usize = 12;
    for threads in [1, 2] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            for (network, merged, batch) in [
                ("mobilenetv2-0.35", false, 1),
                ("mobilenetv2-0.35", false, 6),
                ("mobilenetv2-0.35", true, 1),
                ("mobilenetv2-0.35", true, 6),
                ("resnet18", false, 2),
            ] {
                let mut engine = engine(network, merged, batch, false);
                let images = vec![0.5; batch * 64 * 64 * 3];
                let asked = asked_for(PASSES, || {
                    engine.forward(&images).unwrap();
                });
                // Which thread does what follows from nothing, so that a later pass may still find one unprepared.
                let last = if threads == 1 { asked[PASSES - 1] } else { *asked.iter().min().unwrap() };
                assert_eq!(last, (0, 0), "{network}, merged {merged}, batch {batch}, {threads} threads: {asked:?}");
            }
            let mut engine = engine("mobilenetv2-0.35", false, 8, true);
            let (images, d_logits) = (vec![0.5; 8 * 64 * 64 * 3], Device::Cpu.upload(&[0.01; 8 * 10]).unwrap());
            let asked = asked_for(PASSES, || {
                engine.forward(&images).unwrap();
                engine.backward(&d_logits).unwrap();
            });
            // Lists of partial sums per channel, one entry a chunk or a slab, are made anew: much beside the buffers of so small a
            // network, and as often whatever the batch.
            let share = asked[PASSES - 1].1 as f64 / engine.allocated_bytes() as f64;
            assert!(share < 0.15, "a training step asked for {share} of its buffers: {asked:?}");
        });
    }
}
