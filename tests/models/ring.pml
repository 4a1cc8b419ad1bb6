/* A model of the rings of shmctl/src/ring/, for spin: a host that may be killed at every step, and a guest that
 * may give up, or be killed, at every step.
 *
 *   tests/models/run
 *
 * It follows host.rs and guest.rs step by step, one access to the shared memory each, with two slots instead of
 * sixteen. It checks the assertions, and that no
 * process waits forever.
 */

#ifndef KILLS
#define KILLS 1		/* of the host */
#endif
#ifndef LEAVES
#define LEAVES 1	/* times that a guest gives up, or is killed */
#endif
#define SLOTS 2
#define COMMANDS 3
#define IDS (COMMANDS + LEAVES * SLOTS + 1)

/* The shared memory: the host's section, and the guest's. */
short h_epoch, h_taken, h_written, h_reset;
short g_reset, g_sent, g_consumed;
short request_number[SLOTS], request_id[SLOTS];
short reply_number[SLOTS], reply_request[SLOTS], reply_id[SLOTS];

/* What is asserted about. */
byte applied[IDS];	/* how often each command was carried out */
bool withdrawn[IDS];	/* the guest was told that it will not be */
byte kills = 0, leaves = 0;
bool is_host_up = false;

#define slot(epoch, number) ((number - epoch - 1) % SLOTS)

active proctype host()
{
	short p_epoch, p_taken, p_written, p_reset;	/* the private copy of its section */
	short p_consumed, seen, last, n, id, number;
	short wait_id[SLOTS], wait_request[SLOTS];	/* replies that wait for room */
	byte waiting, at;

#define STEP if :: true :: kills < KILLS -> kills++; goto down fi

start:
	/* HostRing::open: goes on with what is there. */
	atomic {
		p_epoch = h_epoch; p_taken = h_taken; p_written = h_written; p_reset = h_reset;
		if
		:: p_written - SLOTS > p_epoch -> p_consumed = p_written - SLOTS
		:: else -> p_consumed = p_epoch
		fi;
		waiting = 0; at = 0; is_host_up = true
	}
poll:
end:	/* There may be nothing to do for ever. */
	atomic {
		(g_reset != p_reset || (waiting > at && g_consumed != p_consumed) || g_sent != p_taken || kills < KILLS);
		last = g_sent; seen = g_reset
	}
	STEP;
	if
	:: seen != p_reset ->
		/* reset: the new epoch first, then the guest's number. */
		atomic {
			n = (p_written > p_taken -> p_written : p_taken);
			n = (p_epoch > n -> p_epoch : n);
			p_epoch = n + 2 * SLOTS; p_taken = p_epoch; p_written = p_epoch;
			p_consumed = p_epoch; p_reset = seen; waiting = 0; at = 0
		}
		h_epoch = p_epoch; STEP;
		h_taken = p_taken; STEP;
		h_written = p_written; STEP;
		h_reset = p_reset; STEP;
		goto poll
	:: else
	fi;
	if
	:: at < waiting -> goto deliver
	:: else
	fi;
	if
	:: last > p_taken && last - p_taken <= SLOTS ->
		atomic { waiting = 0; at = 0; n = p_taken + 1 }
		do
		:: n <= last ->
			/* A slot is copied once: whatever is there then. */
			atomic { number = request_number[slot(p_epoch, n)]; id = request_id[slot(p_epoch, n)] }
			STEP;
			atomic {
				if
				:: number == n ->
					assert(!withdrawn[id]);
					applied[id]++;
					/* Twice only if the host was killed between the command and its reply. */
					assert(applied[id] <= 1 + kills)
				:: else -> id = 0	/* an error */
				fi;
				wait_id[waiting] = id; wait_request[waiting] = n; waiting++; n++
			}
			STEP
		:: else -> break
		od
	:: else -> goto poll
	fi;
deliver:
	do
	:: at < waiting ->
		atomic {
			if
			:: g_consumed >= p_consumed && g_consumed <= p_written -> p_consumed = g_consumed
			:: else
			fi
		}
		if
		:: p_written - p_consumed >= SLOTS -> goto poll
		:: else
		fi;
		atomic {
			reply_number[slot(p_epoch, p_written + 1)] = p_written + 1;
			reply_request[slot(p_epoch, p_written + 1)] = wait_request[at];
			reply_id[slot(p_epoch, p_written + 1)] = wait_id[at]
		}
		STEP;
		/* `written` and `taken` are one write. */
		atomic { p_written++; p_taken = wait_request[at]; at++; h_taken = p_taken; h_written = p_written }
		STEP
	:: else -> goto poll
	od;
down:
	/* Killed: everything private is lost. Somebody starts it again. */
	is_host_up = false;
	goto start
}

active proctype guest()
{
	short epoch, before, number, last, reset, consumed, h1, h2, h3, h4;
	byte next = 1, first, count, id, answered = 0, expected;
	byte kills_before;
	bool is_settled, gave_up;

#define IN_RANGE (h_written - consumed >= 0 && h_written - consumed < SLOTS)
#define IN_SLOT (reply_number[slot(epoch, consumed)] == consumed)

/* Gives up, or is killed and started again: a new sender takes over. */
#define LEAVE if :: true :: leaves < LEAVES -> leaves++; goto take_over fi

take_over:
	do
	:: answered == COMMANDS -> goto done
	:: else -> break
	od;
	/* `reset` first: who sees it, sees the epoch that was written before it. */
	h4 = h_reset; h1 = h_epoch; h2 = h_taken; h3 = h_written;
	is_settled = (g_reset == h4);
	if
	:: is_settled && g_sent == h2 && g_consumed == h3 -> epoch = h1; before = g_sent
	:: else ->
		if
		:: is_settled && h2 == h1 && h3 == h1 && g_sent < h1
		:: else ->
			g_reset = (is_settled -> g_reset + 1 : g_reset);
			LEAVE;
			(h_reset == g_reset)
		fi;
		epoch = h_epoch;
		g_consumed = epoch; LEAVE;
		g_sent = epoch; before = epoch
	fi;
	LEAVE;
	/* One or two commands at once, of those that are left. */
	atomic {
		if
		:: count = 1
		:: COMMANDS - answered >= 2 -> count = 2
		fi;
		first = next; next = next + count; assert(next <= IDS);
		number = before + 1; last = before + count; kills_before = kills; gave_up = false
	}
	do
	:: number <= last ->
		atomic {
			request_number[slot(epoch, number)] = number;
			request_id[slot(epoch, number)] = first + (number - before - 1)
		}
		number++
	:: else -> break
	od;
	LEAVE;
	g_sent = last;
	expected = first; number = before + 1;
	do
	:: number <= last ->
		consumed = g_consumed + 1;
		if
		:: !gave_up && (h_epoch != epoch || IN_RANGE) && IN_SLOT -> goto receive
		:: !gave_up && h_epoch != epoch && !IN_SLOT -> goto unknown
		:: !gave_up && leaves < LEAVES ->
			/* Gives up: withdraws, and waits for it, however it ends. */
			leaves++; gave_up = true;
			if
			:: h_reset == g_reset -> g_reset = g_reset + 1
			:: else
			fi
		:: !gave_up && leaves < LEAVES -> leaves++; goto take_over	/* killed */
		:: gave_up
		fi;
		if
		:: (h_epoch != epoch || IN_RANGE) && IN_SLOT -> goto receive
		:: h_reset == g_reset ->
			/* Followed: what has no reply by now was not carried out, and will not be. */
			atomic {
				if
				:: IN_SLOT -> goto receive
				:: else ->
					assert(kills > kills_before || applied[expected] == 0);
					withdrawn[expected] = true
				fi
			}
			goto take_over
		:: true -> goto take_over	/* killed, or tired of waiting */
		fi;
receive:
		atomic {
			/* The reply to this request, and to the command that was written there. */
			assert(reply_request[slot(epoch, consumed)] == number);
			assert(reply_id[slot(epoch, consumed)] == expected);
			assert(applied[expected] >= 1 && !withdrawn[expected]);
			assert(kills > kills_before || applied[expected] == 1);
			answered++; expected++; number++;
			g_consumed = consumed
		}
	:: else -> goto take_over
	od;
unknown:
	/* The host has begun anew although this guest has not asked for it: another sender of the VM has. */
	assert(false);
done:
	skip
}
