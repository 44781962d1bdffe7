//! Copies beside the work of a GPU: batches arrive in order, and the emulator refuses what is in no order.

use std::path::Path;

use depthshrinker::Result;
use depthshrinker::device::cache::Cache;
use depthshrinker::device::driver::{Driver, Queue};
use depthshrinker::device::emulator::{Emulator, EmulatorOptions};
use depthshrinker::device::gpu::{Gpu, GpuBuffer};
use depthshrinker::device::relay::Relay;
use depthshrinker::dtype::Dtype;

fn driver() -> Emulator {
    let cache = Cache::at(Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels"));
    Emulator::new(EmulatorOptions::default(), cache).expect("a C++ compiler")
}

#[test]
fn what_is_passed_arrives_in_order_whatever_the_host_writes_next() {
    let gpu = Gpu::new(Box::new(driver()));
    let mut target = GpuBuffer::zeros(&gpu, Dtype::F32, 16).unwrap();
    let mut relay = Relay::new(&gpu, 64).unwrap();
    for batch in 0..7u8 {
        let mut bytes = vec![batch; 64 - usize::from(batch)];
        relay.send(&bytes, &mut target).unwrap();
        bytes.fill(0xee);
        // As long as nobody reads, nothing but the relay waits.
        if batch % 4 == 3 {
            let mut got = vec![0; bytes.len()];
            target.read_bytes(&mut got).unwrap();
            assert_eq!(got, vec![batch; bytes.len()]);
        }
    }
}

/// Every rule of copies beside the work, broken once.
#[test]
fn copies_that_are_not_ordered_are_errors() {
    let faults = ["work too early", "copy too early", "memory changed", "memory freed", "none"];
    for fault in faults {
        let emulator = driver();
        let go = || -> Result<()> {
            let (at, room) = (emulator.allocate(64)?, emulator.allocate(64)?);
            let mut host = emulator.allocate_host(64)?;
            let (copied, taken) = (emulator.event()?, emulator.event()?);
            // SAFETY: all memory is as long, and freed in the end; that it is used too early is what the emulator is to find.
            unsafe {
                for content in [1, 2] {
                    emulator.wait(copied)?;
                    host.bytes_mut().fill(content);
                    if fault != "copy too early" {
                        emulator.order(Queue::Copies, taken)?;
                    }
                    emulator.upload_beside(room, host, 64)?;
                    emulator.record(copied, Queue::Copies)?;
                    if fault == "memory changed" {
                        host.bytes_mut()[63] = 9;
                    }
                    if fault == "memory freed" {
                        emulator.free(room);
                        emulator.zero(at, 64)?;
                    }
                    if fault != "work too early" {
                        emulator.order(Queue::Work, copied)?;
                    }
                    emulator.copy(at, room, 64)?;
                    emulator.record(taken, Queue::Work)?;
                }
                let (later, mut seen) = (emulator.event()?, emulator.allocate_host(64)?);
                emulator.download_later(seen, at, 64)?;
                emulator.record(later, Queue::Work)?;
                emulator.zero(at, 64)?;
                assert_ne!(seen.bytes_mut()[0], 2, "read before it was waited for");
                emulator.wait(later)?;
                assert_eq!(seen.bytes_mut(), [2; 64]);
            }
            Ok(())
        };
        let expected = match fault {
            "work too early" => "work uses memory that a copy beside it uses",
            "copy too early" => "a copy uses memory that work beside it uses",
            "memory changed" => "memory was changed while a copy",
            "memory freed" => "memory was freed while a copy",
            _ => "",
        };
        let told = go().map_or_else(|error| error.to_string(), |()| String::new());
        assert!(told.contains(expected) && told.is_empty() == expected.is_empty(), "{fault}: {told}");
    }
}
