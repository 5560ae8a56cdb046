/* The batch ring (kernels/ring.pyx) with its use by the front end and the worker, for the model checker spin.
 *
 * test_ring_model.py checks it exhaustively in several small configurations, and checks that it fails when
 * any one of the things that it relies on is taken away (the mutations, below). By hand:
 *
 *     spin -a -DWORKERS=2 -DDEATHS=1 ring.pml && gcc -O2 -DSAFETY -o pan pan.c && ./pan -m20000
 *     spin -t -p -g -l -DWORKERS=2 -DDEATHS=1 ring.pml      # what led to an error
 *
 * WHAT IS CHECKED
 *
 *   As the absence of invalid end states: the front end ends only when every row is answered or cancelled
 *     and every slot is free, and its wait for the next event is no valid end. So a lost row, or a wake-up
 *     lost by a worker or by the front end, is a state in which nothing moves and the front end has not
 *     ended. There are no cycles (the test looks for them): every run ends.
 *   As assertions: a row is answered once, with its own output; a row that was cancelled before the seal does
 *     not run; a row runs once, and once more for each confirmed death of a worker that held it; nothing
 *     is written into, moved in, retried or freed under a worker that may be reading it; a worker runs a
 *     slot with the shape that its rows have; the shared word never contradicts the mirror (CORRUPT).
 *
 * WHAT STANDS FOR WHAT
 *
 *   FrontEnd  the event loop with one Dispatcher, its Placement, one Lane and its Producer. Between two
 *             events it is at `waiting`, where whatever can happen may be next: a request comes or is
 *             cancelled, the bell or a pidfd is readable, the supervisor tells of a new worker.
 *     submit, append        Placement.place, Lane.append, Producer.phase and append
 *     submit, opened        Placement.place, Lane.open, Producer.open and publish
 *     close                 Placement._close, Producer.complete
 *     placed                Producer.wake, _Board.wake_one
 *     TAKE_BACK, edit       Dispatcher.cancel, Placement.take_out, Lane.drop, Producer.edit and edited
 *     ring, collect         Dispatcher.on_bell, Lane.collect, Producer.collect; with `answer` and
 *                           `prepare_free`: Dispatcher._finish and _answer, Lane.release, Producer.free
 *     arm                   Producer.arm
 *     meet                  Dispatcher.worker_up and _offer; then the worker's Mailbox, Consumer.nudge
 *     bury                  Dispatcher.worker_died and _rerun, Lane.held_by, Producer.retry
 *     wake_all              Producer.wake_all, _Board.wake_all. Then as after a bell: a worker that took
 *                           `armed` and died before it rang leaves the lane unarmed (NO_REARM).
 *   Worker    one seat: Worker.run of one incarnation after the other
 *     begin                 Consumer.__cinit__
 *     again                 Worker._read_mail, Consumer.best, Worker._wait_until
 *     seal, handed_on       Worker._take, Consumer.seal and pass_on
 *     running               Worker._run_slot, Consumer.publish, gw_ring_bell
 *     idle, retract, sleep  Consumer.announce, the second look, Consumer.retract and sleep, gw_futex_wait
 *     dead                  the process is gone and its stores have become visible; its pidfd is readable,
 *                           and the supervisor may start another on its seat. While another worker lives
 *                           it may as well never do so: the others have to do without.
 *   Memory    the store buffers: it makes delayed writes visible, whenever it likes
 *
 * THE MACHINE is weaker than x86. Each process has a buffer of DEPTH writes that others do not see yet; they
 * become visible in their order (every store is a release) while later loads go ahead. Not only plain stores
 * wait there: so do the changes of the bitmaps and the store of a compare-and-swap on a slot's word, as
 * acquire-release allows; until it is visible the word is closed to the compare-and-swaps of others. Only
 * gw_fence and system calls empty the buffer. (So do swaps of `armed`, of the done bits and of a seat here;
 * all but collect's and retract's follow a fence anyway.) With -DTSO every read-modify-write does, as on x86.
 *
 * WHAT IS LEFT OUT. Other lanes, further slots, requests of several rows; most bits of the word; generations
 * beyond 3. FAILED is not told from DONE, so nothing is split, nor is a batch at its second death; a retry
 * does not wait for judgement. Of equals a worker takes the slot with the lower number, not the oldest.
 * A futex wait ends by itself at any time, but at most TIMEOUTS times in all, so that no time-out stands in
 * for a wake-up; for the same reason a slot that workers hold back (HOLD) never becomes due. The bounds of
 * the queue, failing calls and peers that scribble are not here. Rows' bytes are visible as soon as they are
 * written, which is the worst for a reader who should not see them; that one who should does see them is
 * what release and acquire give.
 */

/* ==== Size ==== */

#ifndef WORKERS
#define WORKERS 2 /* 1 or 2 */
#endif
#ifndef ROWS
#define ROWS 2 /* 1 to 3 */
#endif
#ifndef CAPACITY
#define CAPACITY 2 /* rows a slot takes */
#endif
#ifndef OTHER_SHAPE
#define OTHER_SHAPE ROWS /* rows from this one on have another shape */
#endif
#ifndef CANCELS
#define CANCELS 0 /* at most, in all; so are the following */
#endif
#ifndef DEATHS
#define DEATHS 0 /* 0 to 4 */
#endif
#ifndef MORTALS
#define MORTALS WORKERS /* only workers on the first so many seats die */
#endif
#ifndef TIMEOUTS
#define TIMEOUTS 0 /* futex waits that end by themselves */
#endif
#ifndef HANGS
#define HANGS 0 /* workers that never come back from the model: their slot's rows need not be answered */
#endif
#ifndef DEPTH
#define DEPTH 2 /* of a store buffer, 1 to 3 */
#endif
#define SLOTS 2
/* BURST  the front end may wake once after several additions, as Producer.wake allows
 * HOLD   workers hold back a slot that is not complete (max_queue_delay_us), without end
 * STALL  the supervisor starts a worker in a dead one's place, and stops: the front end never hears of it
 * TSO    the machine is x86
 */

/* ==== Mutations ====
 *
 * NO_FENCE_APPEND         Producer.wake does not fence
 * NO_FENCE_ANNOUNCE       Consumer.announce does not fence
 * NO_FENCE_PUBLISH        Consumer.publish does not fence between the done bit and its look at `armed`
 * NO_FENCE_ARM            Producer.arm does not fence
 * NO_SECOND_LOOK          a worker that announced itself sleeps without looking again
 * NO_LOOK_AFTER_ARM       Producer.arm does not look at the done bits
 * NO_FUTEX_VALUE          the futex waits without comparing its word
 * NO_WAKE_AFTER_EDIT      nobody is woken after an edit
 * NO_WAKE_AFTER_COMPLETE  nobody is woken after a slot was completed
 * COMPLETE_PART           Placement._close completes no full slot: a cancel may make room in one (HOLD)
 * NO_WAKE_ALL             nobody is woken after a death, but for slots to retry
 * SEEN_UNMET              a worker without a lane announces itself like any other (STALL)
 * WAKE_ONLY_WAITING       wake_all passes over seats that are not WAITING
 * NO_PASS_ON              a worker that sealed a slot wakes nobody
 * NO_REARM                Dispatcher.worker_died neither collects nor arms
 * NO_DONE_OF_DEAD         Dispatcher.worker_died looks for SEALED slots only
 * NO_GENERATION           a freed slot keeps its generation
 * BLIND_SEAL              Consumer.seal stores instead of comparing
 * BLIND_EDIT              Producer.edit stores instead of comparing
 * LATE_CLEAR              the open bit is cleared after publishing instead of before
 * EARLY_REPORT            the done bit is set before the word says DONE
 * UNCONFIRMED_DEATH       a worker that lives may be taken for dead
 * SAME_INCARNATION        the next worker on a seat has the number of the dead one
 */
#ifdef NO_FENCE_APPEND
#define IS_FENCED_TO_WAKE(worker) (IS_DRAINED(0) || memory[SEAT(worker)] == RUNNING)
#else
#define IS_FENCED_TO_WAKE(worker) IS_DRAINED(0)
#endif
#ifdef NO_FENCE_ANNOUNCE
#define IS_FENCED_TO_SLEEP true
#else
#define IS_FENCED_TO_SLEEP IS_DRAINED(cpu)
#endif
#ifdef NO_FENCE_PUBLISH
#define IS_FENCED_TO_RING (IS_DRAINED(cpu) || memory[ARMED] == 0)
#else
#define IS_FENCED_TO_RING IS_DRAINED(cpu)
#endif
#ifdef NO_FENCE_ARM
#define IS_FENCED_TO_WAIT true
#else
#define IS_FENCED_TO_WAIT IS_DRAINED(0)
#endif

/* ==== A slot's word: ring_layout.h with fewer bits ==== */

#define FREE 0
#define OPEN 1
#define EDIT 2
#define SEALED 3
#define DONE 4
#define RETRY 5
#define WORD(phase, owner, rows, generation) \
    ((phase) | ((owner) << 3) | ((rows) << 6) | (((generation) & 3) << 8))
#define PHASE(word) ((word) & 7)
#define OWNER(word) (((word) >> 3) & 7)
#define COUNT(word) (((word) >> 6) & 3)
#define GENERATION(word) ((word) >> 8)
#define IS_SEALABLE(word) (PHASE(word) == OPEN || PHASE(word) == RETRY)

#define RUNNING 0
#define WAITING 1

/* ==== The machine ==== */

/* The shared words: those of the slots, 0 to SLOTS - 1, and these. */
#define OPEN_BITS SLOTS
#define DONE_BITS (SLOTS + 1)
#define ARMED (SLOTS + 2)
#define SEAT(worker) (SLOTS + 3 + (worker))
#ifdef HOLD
#define COMPLETE(slot) (SLOTS + 3 + WORKERS + (slot)) /* in the slot's record */
short memory[SLOTS + 3 + WORKERS + SLOTS];
#else
short memory[SLOTS + 3 + WORKERS];
#endif

/* Store buffers, oldest entry first. CPU 0 is the front end's, CPU w + 1 that of worker w. */
#define CPUS (WORKERS + 1)
#define SET 16   /* added to the place: set the value's bits in it */
#define CLEAR 32 /* clear them */
#define PLACE(entry) ((entry) & 15)
byte delayed[CPUS];
byte place[CPUS * DEPTH];
short value[CPUS * DEPTH];

#define IS_DRAINED(cpu) (delayed[cpu] == 0)
#define HAS_ROOM(cpu) (delayed[cpu] < DEPTH)

/* Scratch, without meaning between steps. */
hidden short old;
hidden byte i, r;

inline overlay(entry, word, into) {
    if
    :: PLACE(place[entry]) != (word) -> skip
    :: else ->
        if
        :: place[entry] < SET -> into = value[entry]
        :: place[entry] >= CLEAR -> into = into & (7 - value[entry])
        :: else -> into = into | value[entry]
        fi
    fi
}

/* A CPU sees its own delayed writes. */
inline load(cpu, word, into) {
    into = memory[word];
    if :: delayed[cpu] > 0 -> overlay((cpu) * DEPTH, word, into) :: else fi
#if DEPTH > 1
    ;
    if :: delayed[cpu] > 1 -> overlay((cpu) * DEPTH + 1, word, into) :: else fi
#endif
#if DEPTH > 2
    ;
    if :: delayed[cpu] > 2 -> overlay((cpu) * DEPTH + 2, word, into) :: else fi
#endif
}

/* gw_store64, gw_store32; needs HAS_ROOM */
inline store(cpu, word, v) {
    place[(cpu) * DEPTH + delayed[cpu]] = word;
    value[(cpu) * DEPTH + delayed[cpu]] = v;
    delayed[cpu]++
}

/* gw_set_bits64 and gw_clear_bits64 need CAN_CHANGE, gw_cas64 on a slot's word CAN_CAS. */
#ifdef TSO
#define CAN_CHANGE(cpu) IS_DRAINED(cpu)
#define CAN_CAS(cpu, word) IS_DRAINED(cpu)
inline set_bit(cpu, word, n) { memory[word] = memory[word] | (1 << (n)) }
inline clear_bit(cpu, word, n) { memory[word] = memory[word] & (7 - (1 << (n))) }
inline exchange(cpu, word, v) { memory[word] = v }
#else
#define CAN_CHANGE(cpu) HAS_ROOM(cpu)
#define CAN_CAS(cpu, word) (HAS_ROOM(cpu) && !IS_HELD(cpu, word))
#define IS_AT(cpu, n, word) (delayed[cpu] > n && PLACE(place[(cpu) * DEPTH + n]) == (word))
#if DEPTH == 1
#define IS_DELAYED(cpu, word) IS_AT(cpu, 0, word)
#elif DEPTH == 2
#define IS_DELAYED(cpu, word) (IS_AT(cpu, 0, word) || IS_AT(cpu, 1, word))
#else
#define IS_DELAYED(cpu, word) (IS_AT(cpu, 0, word) || IS_AT(cpu, 1, word) || IS_AT(cpu, 2, word))
#endif
#if WORKERS == 1
#define IS_HELD(cpu, word) IS_DELAYED(1 - (cpu), word)
#else
#define IS_HELD(cpu, word) \
    (IS_DELAYED(((cpu) + 1) % CPUS, word) || IS_DELAYED(((cpu) + 2) % CPUS, word))
#endif
inline set_bit(cpu, word, n) { store(cpu, (word) + SET, 1 << (n)) }
inline clear_bit(cpu, word, n) { store(cpu, (word) + CLEAR, 1 << (n)) }
inline exchange(cpu, word, v) { store(cpu, word, v) }
#endif

inline cas(cpu, word, expected, desired, ok) {
    load(cpu, word, old);
    ok = (old == (expected));
    if :: ok -> exchange(cpu, word, desired) :: else fi
}

active proctype Memory() {
    byte cpu;
end:
    do
    :: atomic {
           if
           :: !IS_DRAINED(0) -> cpu = 0
           :: !IS_DRAINED(1) -> cpu = 1
#if WORKERS > 1
           :: !IS_DRAINED(2) -> cpu = 2
#endif
           fi;
           d_step {
               i = cpu * DEPTH;
               old = PLACE(place[i]);
               overlay(i, old, memory[old]);
               delayed[cpu]--;
               do
               :: i == cpu * DEPTH + delayed[cpu] -> break
               :: else -> place[i] = place[i + 1]; value[i] = value[i + 1]; i++
               od;
               place[i] = 0;
               value[i] = 0;
               cpu = 0
           }
       }
    od
}

/* ==== What is not in shared memory ==== */

byte deaths, timeouts, hangs;
byte alive = WORKERS;
byte incarnations = WORKERS;
bit bell;            /* the eventfd */
bit asleep[WORKERS]; /* in futex_wait */
bit up[WORKERS];     /* loaded; the front end is to be told */
bit mail[WORKERS];   /* a lane was offered and is not attached yet */
byte gone;           /* bits of the incarnations whose pidfd is readable */

#define NEW 0
#define PLACED 1
#define ANSWERED 2
#define DROPPED 3 /* cancelled in time */
#define LATE 4    /* cancelled when a worker had it: it may run, its result is dropped */
byte state[ROWS];

/* In the slots' memory a row is its number + 1. What the front end wrote is also what it remembers. */
byte input[SLOTS * CAPACITY];
byte output[SLOTS * CAPACITY];
bit shape[SLOTS]; /* the record's shape_id */
#define SHAPE(row) ((row) >= OTHER_SHAPE)

/* Ghosts: what is true, for assertions only. */
byte reading[SLOTS]; /* rows that a live worker may be reading */
bit ran[ROWS];       /* and published, since the last confirmed death of a worker that held it */
bit hung[SLOTS];

/* ==== The worker ==== */

#define cpu (me + 1)

/* What others can see, in one step. A worker may die instead; to die before it only looks at something
 * makes no difference to anybody. */
#if DEATHS
#define STEP(...) \
    if \
    :: atomic { __VA_ARGS__ } \
    :: atomic { me < MORTALS && deaths < DEATHS -> die(); goto dead } \
    fi
#else
#define STEP(...) atomic { __VA_ARGS__ }
#endif

inline forget_look() {
    found = SLOTS;
    found_word = 0;
    rank = 0;
    found_shape = 0;
    letter = 0
}

inline die() {
    d_step {
        deaths++;
        if :: slot < SLOTS -> reading[slot] = 0 :: else fi;
        slot = SLOTS;
        n = 0;
        bits = 0;
        is_first = 1;
        slot_word = 0;
        got = 0;
        attached = 0;
        slot_shape = 0;
        asleep[me] = 0;
        up[me] = 0;
        mail[me] = 0;
#ifdef HOLD
        until = 0;
#endif
        forget_look()
    }
}

/* What Consumer.best prefers: 0 where there is nothing, 1 to hold back, then what to seal. */
#ifdef HOLD
#define RANK(word, is_complete) \
    (PHASE(word) == RETRY -> 3 : (COUNT(word) == CAPACITY || is_complete -> 2 : 1))
#else
#define RANK(word, is_complete) (PHASE(word) == RETRY -> 3 : 2)
#endif

/* One word at a time: the open bits (and the mail), then the slots that they name. */
inline look(is_fenced) {
    d_step {
        is_fenced || !is_first ->
        if
        :: is_first ->
            is_first = 0;
            letter = mail[me];
            load(cpu, OPEN_BITS, got);
            bits = (attached -> got : 0)
        :: else ->
            n = (bits & 1 -> 0 : 1);
            bits = bits & (bits - 1);
            load(cpu, n, got);
#ifdef HOLD
            load(cpu, COMPLETE(n), old);
#endif
            if
            :: IS_SEALABLE(got) && RANK(got, old) > rank ->
                found = n;
                found_word = got;
                rank = RANK(got, old);
                found_shape = shape[n]
            :: else
            fi;
            n = 0
        fi;
        got = 0
    }
}
#define LOOK_THEN(is_fenced, least_rank, if_less, if_found, if_mail) \
    do \
    :: atomic { \
           look(is_fenced); \
           if \
           :: bits \
           :: else -> \
               is_first = 1; \
               if \
               :: letter -> goto if_mail \
               :: !letter && rank < least_rank -> goto if_less \
               :: !letter && rank >= least_rank -> goto if_found \
               fi \
           fi \
       } \
    od

#define MINE(phase, word) WORD(phase, incarnation, COUNT(word), GENERATION(word))
#define UNTIL (rank == 1 -> 1 + found + SLOTS * GENERATION(found_word) : 0)

proctype Worker(byte me) {
    byte incarnation = me + 1;
    bit attached = 1;    /* to the lane */
    byte slot = SLOTS;   /* that it sealed */
    short slot_word;     /* as it was sealed */
    bit slot_shape;
    byte found = SLOTS;  /* what the last look found: a slot, */
    short found_word;
    bit found_shape;
    byte rank;           /* its rank, */
    bit letter;          /* and mail */
    bit is_first = 1;    /* the step of a look that reads the open bits */
    byte n, bits;
    short got;
#ifdef HOLD
    byte until; /* for which slot and generation it waits, 0: for ever */
#endif

begin:
    STEP(HAS_ROOM(cpu) -> d_step { store(cpu, SEAT(me), RUNNING) });
again:
    LOOK_THEN(true, 2, idle, seal, read_mail);
read_mail:
    atomic { attached = 1; mail[me] = 0; forget_look(); goto again };

seal:
    STEP(CAN_CAS(cpu, found) ->
        d_step {
            cas(cpu, found, found_word, MINE(SEALED, found_word), got);
#ifdef BLIND_SEAL
            if :: !got -> exchange(cpu, found, MINE(SEALED, found_word)) :: else fi;
            got = 1;
#endif
            if
            :: got ->
                assert(reading[found] == 0);
                reading[found] = COUNT(found_word);
                slot = found;
                slot_word = found_word;
                slot_shape = found_shape
            :: else
            fi;
            forget_look()
        }
        if :: got -> got = 0 :: else -> goto again fi);
#ifndef LATE_CLEAR
    STEP(CAN_CHANGE(cpu) -> d_step { clear_bit(cpu, OPEN_BITS, slot) });
#endif
#if WORKERS > 1 && !defined(NO_PASS_ON)
    LOOK_THEN(true, 1, running, handed_on, handed_on);
handed_on: /* to the other worker; with the fence before */
    STEP(IS_DRAINED(cpu) ->
        d_step {
            forget_look();
            n = 1 - me;
            got = memory[SEAT(n)];
            memory[SEAT(n)] = RUNNING
        }
        if :: got == WAITING -> got = 0 :: else -> n = 0; goto running fi);
    STEP(IS_DRAINED(cpu) -> asleep[n] = 0; n = 0);
#endif

running:
#if HANGS
    if
    :: true
    :: atomic { hangs < HANGS -> hangs++; hung[slot] = 1 };
end_hung:
        false
    fi;
#endif
#ifdef UNCONFIRMED_DEATH
    if
    :: true
    :: atomic { deaths < DEATHS -> deaths++; gone = gone | (1 << incarnation) }
    fi;
#endif
#ifdef EARLY_REPORT
    STEP(CAN_CHANGE(cpu) -> d_step { set_bit(cpu, DONE_BITS, slot) });
#endif
    STEP(CAN_CAS(cpu, slot) ->
        d_step {
            cas(cpu, slot, MINE(SEALED, slot_word), MINE(DONE, slot_word), got);
            assert(got);
            got = 0;
            i = 0;
            do
            :: i == COUNT(slot_word) -> break
            :: else ->
                assert(input[slot * CAPACITY + i] > 0);
                r = input[slot * CAPACITY + i] - 1;
                assert(state[r] == PLACED || state[r] == LATE);
                assert(SHAPE(r) == slot_shape);
                assert(!ran[r]);
                ran[r] = 1;
                output[slot * CAPACITY + i] = r + 1;
                i++
            od;
            reading[slot] = 0;
            slot_shape = 0;
            forget_look();
            slot_word = 0
        });
#ifdef LATE_CLEAR
    STEP(CAN_CHANGE(cpu) -> d_step { set_bit(cpu, DONE_BITS, slot) });
    STEP(CAN_CHANGE(cpu) -> d_step { clear_bit(cpu, OPEN_BITS, slot); slot = SLOTS });
#elif defined(EARLY_REPORT)
    slot = SLOTS;
#else
    STEP(CAN_CHANGE(cpu) -> d_step { set_bit(cpu, DONE_BITS, slot); slot = SLOTS });
#endif
    STEP(IS_FENCED_TO_RING ->
        d_step { got = memory[ARMED]; memory[ARMED] = 0 }
        if :: got -> got = 0 :: else -> goto again fi);
    STEP(IS_DRAINED(cpu) -> bell = 1; goto again);

idle:
#ifndef SEEN_UNMET
    if
    :: attached
    :: !attached ->
end_unmet:
        STEP(mail[me] -> goto again)
    fi;
#endif
    STEP(HAS_ROOM(cpu) ->
        d_step {
            store(cpu, SEAT(me), WAITING);
#ifdef HOLD
            until = UNTIL;
#endif
            forget_look()
        });
#ifndef NO_SECOND_LOOK
#ifdef HOLD
    LOOK_THEN(IS_FENCED_TO_SLEEP, 2, compare, retract, retract);
compare:
    atomic {
        if
        :: until == UNTIL -> forget_look()
        :: else -> until = 0; goto retract
        fi;
        until = 0;
        goto sleep
    };
#else
    LOOK_THEN(IS_FENCED_TO_SLEEP, 2, sleep, retract, retract);
#endif
retract:
    STEP(IS_DRAINED(cpu) ->
        d_step {
            memory[SEAT(me)] = RUNNING;
#ifdef HOLD
            until = 0;
#endif
            forget_look()
        }
        goto again);
#endif
sleep:
#ifdef NO_FUTEX_VALUE
    STEP(IS_DRAINED(cpu) -> asleep[me] = 1);
#else
    STEP(IS_DRAINED(cpu) -> asleep[me] = (memory[SEAT(me)] == WAITING));
#endif
end_asleep:
    STEP((!asleep[me] || timeouts < TIMEOUTS) && HAS_ROOM(cpu) ->
        d_step {
            timeouts = timeouts + asleep[me];
            asleep[me] = 0;
            store(cpu, SEAT(me), RUNNING)
        }
        goto again);

#if DEATHS
dead:
    atomic {
        IS_DRAINED(cpu) ->
#ifdef STALL
        if :: incarnation <= WORKERS -> gone = gone | (1 << incarnation) :: else fi;
#else
        gone = gone | (1 << incarnation);
#endif
        alive--;
#ifndef SAME_INCARNATION
        incarnation = 0
#endif
    };
    if
    :: atomic {
           alive++;
           up[me] = 1;
#ifndef SAME_INCARNATION
           incarnations++;
           incarnation = incarnations;
#endif
           goto begin
       }
    :: alive > 0
    fi
#endif
}
#undef cpu

/* ==== The front end ==== */

#define IS_FREE(s) (m_phase[s] == FREE)
#define IS_OVER(s) (IS_FREE(s) || hung[s])
#define FITS (cursor < SLOTS && shape[cursor] == SHAPE(next) && m_rows[cursor] < CAPACITY)

/* Producer.expected, and what Producer.phase takes for CORRUPT */
#define EXPECTED(s) WORD(m_phase[s], 0, m_rows[s], m_generation[s])
#define IS_SOUND(s, word) \
    (word == EXPECTED(s) || \
     ((m_phase[s] == OPEN || m_phase[s] == RETRY) && (PHASE(word) == SEALED || PHASE(word) == DONE) && \
      GENERATION(word) == m_generation[s] && COUNT(word) == m_rows[s] && OWNER(word) > 0))
inline phase(s, into) {
    load(0, s, into);
    assert(IS_SOUND(s, into))
}

/* Producer.publish but for its last store, STORE_WORD; both need CAN_CHANGE */
inline prepare(s, phase_) {
    set_bit(0, OPEN_BITS, s);
    m_phase[s] = phase_
}
inline prepare_free(s) {
    assert(reading[s] == 0);
    clear_bit(0, OPEN_BITS, s);
    m_phase[s] = FREE;
    m_rows[s] = 0;
#ifndef NO_GENERATION
    m_generation[s] = (m_generation[s] + 1) & 3;
#endif
    shape[s] = 0;
    i = 0;
    do
    :: i == CAPACITY -> break
    :: else -> input[s * CAPACITY + i] = 0; output[s * CAPACITY + i] = 0; i++
    od;
    if :: cursor == s -> cursor = SLOTS :: else fi
}
#define STORE_WORD(s) HAS_ROOM(0) -> d_step { store(0, s, EXPECTED(s)) }

inline answer(s) {
    i = 0;
    do
    :: i == m_rows[s] -> break
    :: else ->
        assert(input[s * CAPACITY + i] == output[s * CAPACITY + i]);
        r = input[s * CAPACITY + i] - 1;
        assert(state[r] == PLACED || state[r] == LATE);
        assert(ran[r]);
        if :: state[r] == PLACED -> state[r] = ANSWERED :: else fi;
        i++
    od
}

/* A look at a seat and the CAS after it are one step: where the CAS fails, the look might have come later. */
#define WAKE_THEN(onwards) \
    do \
    :: atomic { \
           IS_FENCED_TO_WAKE(n) -> \
           d_step { got = memory[SEAT(n)]; memory[SEAT(n)] = RUNNING } \
           if \
           :: got == WAITING -> got = 0; break \
           :: else -> n++; if :: n == WORKERS -> n = 0; goto onwards :: else fi \
           fi \
       } \
    od; \
    atomic { asleep[n] = 0; n = 0; goto onwards }

#define TAKE_BACK(row_) \
    atomic { \
        cancels < CANCELS && state[row_] == PLACED -> \
        row = row_; \
        d_step { \
            cancels++; \
            do \
            :: input[s * CAPACITY + n] == row + 1 -> break \
            :: else -> n++; if :: n == CAPACITY -> n = 0; s++ :: else fi \
            od; \
            phase(s, got) \
        } \
        if \
        :: IS_SEALABLE(got) -> got = 0; goto edit \
        :: else -> d_step { state[row] = LATE; row = 0; s = 0; n = 0; got = 0 } goto waiting \
        fi \
    }

#ifdef HOLD /* nothing comes that would make it due, so each is completed in the end */
#define CAN_OPEN (cursor == SLOTS && (IS_FREE(0) || IS_FREE(1)))
#define CLOSE goto close
#else
#define CAN_OPEN (!FITS && (IS_FREE(0) || IS_FREE(1)))
#define CLOSE cursor = SLOTS; goto waiting
#endif

#ifdef BURST
#define IS_AWAKE !owes_wake
#else
#define IS_AWAKE true
#endif

proctype FrontEnd() {
    byte m_phase[SLOTS], m_rows[SLOTS], m_generation[SLOTS]; /* the mirror */
    byte next;           /* row to be submitted */
    byte cursor = SLOTS; /* slot to append to */
    byte cancels, dead_one, s, n, bits, row;
    short got;
    bit soon; /* on_bell called itself again */
#ifdef BURST
    bit owes_wake;
#endif

waiting:
    if
    :: atomic { /* submit */
           next < ROWS && FITS ->
           d_step { phase(cursor, got) }
           if
           :: PHASE(got) == OPEN -> got = 0; goto append
           :: else -> got = 0; CLOSE
           fi
       }
    :: atomic { /* submit */
           next < ROWS && CAN_OPEN && CAN_CHANGE(0) ->
           d_step {
               cursor = (IS_FREE(0) -> 0 : 1);
               input[cursor * CAPACITY] = next + 1;
               shape[cursor] = SHAPE(next);
               state[next] = PLACED;
               next++;
               m_rows[cursor] = 1;
#ifndef HOLD
               prepare(cursor, OPEN)
#endif
           }
           goto opened
       }
#ifdef HOLD
    :: atomic { cursor < SLOTS && (next == ROWS || !FITS) -> goto close }
#endif
#ifdef BURST
    :: atomic { owes_wake -> owes_wake = 0; goto placed }
#endif
#if CANCELS
    :: TAKE_BACK(0)
#if ROWS > 1
    :: TAKE_BACK(1)
#endif
#if ROWS > 2
    :: TAKE_BACK(2)
#endif
#endif
    :: atomic { IS_AWAKE && bell -> bell = 0; goto ring }
    :: atomic { IS_AWAKE && soon -> soon = 0; goto ring }
#if DEATHS
#ifndef STALL
    :: atomic { IS_AWAKE && up[0] -> up[0] = 0; mail[0] = 1; n = 0; goto meet }
#if WORKERS > 1
    :: atomic { IS_AWAKE && up[1] -> up[1] = 0; mail[1] = 1; n = 1; goto meet }
#endif
#endif
    :: atomic { IS_AWAKE && gone -> goto bury }
#endif
    :: IS_AWAKE && next == ROWS && IS_OVER(0) && IS_OVER(1) -> goto over
    fi;

append:
    atomic {
        CAN_CAS(0, cursor) ->
        d_step {
            cas(0, cursor, EXPECTED(cursor),
                WORD(OPEN, 0, m_rows[cursor] + 1, m_generation[cursor]), got);
            assert(m_rows[cursor] >= reading[cursor]); /* the rows were written before */
            if
            :: got ->
                input[cursor * CAPACITY + m_rows[cursor]] = next + 1;
                m_rows[cursor]++;
                state[next] = PLACED;
                next++
            :: else
            fi
        }
        if :: got -> got = 0; goto placed_one :: else -> CLOSE fi
    }
#ifdef HOLD
close: /* what was closed is completed */
    atomic {
#ifdef COMPLETE_PART
        if :: m_rows[cursor] == CAPACITY -> cursor = SLOTS; goto waiting :: else fi;
#endif
        HAS_ROOM(0) -> d_step { store(0, COMPLETE(cursor), 1); cursor = SLOTS }
#ifdef NO_WAKE_AFTER_COMPLETE
        goto waiting
#else
        goto placed
#endif
    };
#endif
opened:
#ifdef HOLD
    atomic { HAS_ROOM(0) -> d_step { store(0, COMPLETE(cursor), 0) } };
    atomic { CAN_CHANGE(0) -> d_step { prepare(cursor, OPEN) } };
#endif
    atomic { STORE_WORD(cursor) }
placed_one:
#ifdef BURST
    if
    :: atomic { next < ROWS -> owes_wake = 1; goto waiting }
    :: owes_wake = 0
    fi;
#endif
placed:
    WAKE_THEN(waiting);

edit:
    atomic {
        CAN_CAS(0, s) ->
        d_step {
            cas(0, s, EXPECTED(s), WORD(EDIT, 0, m_rows[s], m_generation[s]), got);
#ifdef BLIND_EDIT
            if :: !got -> exchange(0, s, WORD(EDIT, 0, m_rows[s], m_generation[s])) :: else fi;
            got = 1;
#endif
            if
            :: got -> /* move up the rows behind */
                assert(reading[s] == 0);
                state[row] = DROPPED;
                m_rows[s]--;
                do
                :: n == m_rows[s] -> break
                :: else -> input[s * CAPACITY + n] = input[s * CAPACITY + n + 1]; n++
                od;
                input[s * CAPACITY + n] = 0
            :: else -> state[row] = LATE; s = 0
            fi;
            row = 0;
            n = 0
        }
        if :: got -> got = 0 :: else -> goto waiting fi
    };
    atomic {
        CAN_CHANGE(0) ->
        d_step {
            if
            :: m_rows[s] == 0 -> prepare_free(s)
            :: else -> prepare(s, m_phase[s])
            fi
        }
    };
    atomic {
        STORE_WORD(s)
        if
#ifdef NO_WAKE_AFTER_EDIT
        :: true -> s = 0; goto waiting
#else
        :: m_rows[s] == 0 -> s = 0; goto waiting
        :: else -> s = 0; goto placed
#endif
        fi
    };

ring:
    atomic { HAS_ROOM(0) -> d_step { store(0, ARMED, 0) } };
    atomic {
        memory[DONE_BITS] == 0 || IS_DRAINED(0) ->
        d_step { bits = memory[DONE_BITS]; memory[DONE_BITS] = 0 }
        if :: bits :: else -> goto arm fi
    };
collect:
    atomic {
        CAN_CHANGE(0) ->
        d_step {
            s = (bits & 1 -> 0 : 1);
            bits = bits & (bits - 1);
            phase(s, got);
            got = (m_rows[s] > 0 && PHASE(got) == DONE);
            if :: got -> answer(s); prepare_free(s) :: else -> s = 0 fi
        }
        if
        :: got -> got = 0
        :: !got && bits -> goto collect
        :: !got && !bits -> goto arm
        fi
    };
    atomic {
        STORE_WORD(s)
        s = 0;
        if :: bits -> goto collect :: else fi
    };
arm:
    atomic { HAS_ROOM(0) -> d_step { store(0, ARMED, 1) } };
#ifdef NO_LOOK_AFTER_ARM
    goto waiting;
#endif
    atomic { IS_FENCED_TO_WAIT -> if :: memory[DONE_BITS] == 0 -> goto waiting :: else fi };
    atomic { HAS_ROOM(0) -> d_step { store(0, ARMED, 0); soon = 1 } goto waiting };

#if DEATHS
meet:
    atomic { memory[SEAT(n)] = RUNNING };
    atomic { asleep[n] = 0; n = 0; goto waiting };

bury: /* one slot after the other */
    atomic {
        CAN_CHANGE(0) ->
        d_step {
            do
            :: gone & (1 << dead_one) -> break
            :: else -> dead_one++
            od;
            got = FREE;
            do
            :: s == SLOTS -> break
            :: else ->
                phase(s, got);
                got = (m_rows[s] > 0 && OWNER(got) == dead_one -> PHASE(got) : FREE);
#ifdef NO_DONE_OF_DEAD
                if :: got == DONE -> got = FREE :: else fi;
#endif
                if :: got == FREE -> s++ :: else -> break fi
            od;
            if
            :: got == DONE -> answer(s); prepare_free(s)
            :: got == SEALED ->
                assert(reading[s] == 0);
                i = 0;
                do
                :: i == m_rows[s] -> break
                :: else ->
                    r = input[s * CAPACITY + i] - 1;
                    ran[r] = 0;
                    if :: state[r] == PLACED -> got = RETRY :: else fi;
                    i++
                od;
                if :: cursor == s -> cursor = SLOTS :: else fi;
                if :: got == RETRY -> prepare(s, RETRY) :: else -> prepare_free(s) fi
            :: else -> gone = gone & (255 - (1 << dead_one)); s = 0
            fi;
            dead_one = 0
        }
        if :: got == FREE -> goto wake_all :: else fi
    };
    atomic {
        STORE_WORD(s)
        s = 0;
        if :: got == RETRY -> got = 0 :: else -> got = 0; goto bury fi
    };
    WAKE_THEN(bury);
wake_all:
#ifndef NO_WAKE_ALL
    do
    :: atomic {
           IS_DRAINED(0) ->
#ifdef WAKE_ONLY_WAITING
           asleep[n] = asleep[n] && memory[SEAT(n)] == RUNNING;
#endif
           memory[SEAT(n)] = RUNNING
       };
       atomic {
#ifndef WAKE_ONLY_WAITING
           asleep[n] = 0;
#endif
           n++;
           if :: n == WORKERS -> n = 0; break :: else fi
       }
    od;
#endif
#ifdef NO_REARM
    goto waiting;
#else
    goto ring;
#endif
#endif

over:
    skip
}

init {
    atomic {
        memory[ARMED] = 1;
        run FrontEnd();
        run Worker(0);
#if WORKERS > 1
        run Worker(1)
#endif
    }
}
